//! Drawing tokens from logits, and what follows from them for the next step of decoding, so that the host need not be asked
//! between tokens. All memory is the caller's: both launches may be recorded.

use super::lengths::{refuse, room, side};
use super::paged::PAGE;
use super::{Buffer, Device, IndexSlice, Result, Shape, Slice};

const SAMPLE_THREADS: usize = 512;
const ADVANCE_THREADS: usize = 128;
/// The largest vocabulary that there is shared memory for.
const LARGEST_VOCABULARY: usize = 512 << 10;

/// A reply that grows.
pub const LIVE: u32 = 0;
/// A reply that ended with an end token.
pub const END_TOKEN: u32 = 1;
/// A reply that is as long as its record.
pub const TOO_LONG: u32 = 2;
/// A reply that the host ended.
pub const STOPPED: u32 = 3;

/// How tokens are drawn. Each truncation applies to what the one before it left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Whether the most probable token is taken; then the inverse temperature must be 1.
    pub greedy: bool,
    /// 1 / temperature.
    pub inverse_temperature: f32,
    /// Only the k most probable tokens (0 = all).
    pub top_k: usize,
    /// Only the smallest set of most probable tokens with at least this mass (1 = all).
    pub top_p: f32,
    /// No tokens below this share of the most probable one (0 = all).
    pub min_p: f32,
}

/// Rows of logits to draw from.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// `[rows of logits, vocabulary]`.
    pub logits: Slice<'a, f32>,
    /// Logits of a row, at most 524288.
    pub vocabulary: usize,
    /// Which row of logits each row draws from, where it is not its own; several may draw from one.
    pub sources: Option<IndexSlice<'a>>,
    /// The reply that each row's token is for, another one in every row.
    pub replies: IndexSlice<'a>,
}

impl Rows<'_> {
    fn check(&self, kernel: &str, replies: &Replies, drawn: &Drawn) -> Result<()> {
        let (rows, vocabulary) = (self.replies.len(), self.vocabulary);
        if vocabulary == 0 || vocabulary > LARGEST_VOCABULARY {
            return refuse(kernel, format!("a vocabulary of {vocabulary}, of 1 to {LARGEST_VOCABULARY}"));
        }
        let logits = self.logits.len() / vocabulary;
        match self.sources {
            None => room("rows of logits", rows, logits)?,
            Some(sources) => {
                room("sources of rows", rows, sources.len())?;
                sources.check("rows of logits", logits)?;
            }
        }
        replies.check(self.replies)?;
        drawn.check(rows)
    }
}

/// The token that was drawn for each row, and its log-probabilities.
#[derive(Debug)]
pub struct Drawn {
    /// The tokens.
    pub tokens: Buffer<u32>,
    /// Under the model at temperature 1.
    pub logprobs: Buffer<f32>,
    /// Under the tempered model.
    pub policy_logprobs: Buffer<f32>,
    /// Under the distribution that the token was drawn from.
    pub sampling_logprobs: Buffer<f32>,
}

impl Drawn {
    /// Of so many rows.
    ///
    /// # Errors
    /// As [`Device::zeroed`].
    pub fn new(device: &Device, rows: usize) -> Result<Self> {
        let floats = || device.zeroed("log-probabilities of drawn tokens", rows);
        Ok(Self {
            tokens: device.zeroed("drawn tokens", rows)?,
            logprobs: floats()?,
            policy_logprobs: floats()?,
            sampling_logprobs: floats()?,
        })
    }

    fn check(&self, rows: usize) -> Result<()> {
        room("drawn tokens", rows, self.tokens.len())?;
        let logprobs = [&self.logprobs, &self.policy_logprobs, &self.sampling_logprobs];
        logprobs.into_iter().try_for_each(|all| room("log-probabilities of drawn tokens", rows, all.len()))
    }
}

/// What is known of each reply while it grows.
#[derive(Debug)]
pub struct Replies {
    /// The key of its random stream.
    pub keys: Buffer<u64>,
    /// Its tokens so far; the next one is drawn with the random number of this index.
    pub lengths: Buffer<u32>,
    /// [`LIVE`], or how it ended.
    pub finishes: Buffer<u32>,
}

impl Replies {
    /// So many replies without a token, and with keys of 0.
    ///
    /// # Errors
    /// As [`Device::zeroed`].
    pub fn new(device: &Device, replies: usize) -> Result<Self> {
        Ok(Self {
            keys: device.zeroed("random streams of replies", replies)?,
            lengths: device.zeroed("lengths of replies", replies)?,
            finishes: device.zeroed("ends of replies", replies)?,
        })
    }

    fn check(&self, named: IndexSlice) -> Result<()> {
        let lengths = [self.keys.len(), self.lengths.len(), self.finishes.len()];
        lengths.into_iter().try_for_each(|replies| named.check("replies", replies))
    }
}

/// Draws a token for each row whose reply is [`LIVE`]; of others, what was drawn last stays.
///
/// # Errors
/// When lengths, sources or replies do not fit, or the device has failed.
pub fn sample(
    device: &Device,
    settings: &Settings,
    rows: Rows,
    replies: &Replies,
    drawn: &mut Drawn,
) -> Result<()> {
    let name = "sample_tokens";
    rows.check(name, replies, drawn)?;
    let Settings { greedy, inverse_temperature, top_k, top_p, min_p } = *settings;
    let kernel = device.kernel(name)?;
    let launch = kernel.with(Shape::of(rows.replies.len(), SAMPLE_THREADS)).read(rows.logits);
    let launch = launch.read_optional(rows.sources).value(rows.vocabulary as i32).read(rows.replies);
    let launch = launch.read(&replies.keys).read(&replies.lengths).read(&replies.finishes);
    let launch = launch.value(i32::from(greedy)).value(inverse_temperature);
    // As many as there are is all.
    let launch = launch.value(top_k.min(rows.vocabulary) as i32).value(top_p).value(min_p);
    let launch = launch.write(&mut drawn.tokens).write(&mut drawn.logprobs);
    let launch = launch.write(&mut drawn.policy_logprobs).write(&mut drawn.sampling_logprobs);
    // SAFETY: the parameters are those of the kernel; lengths, sources and replies were checked.
    unsafe { launch.launch() }
}

/// Where replies begin and end.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// Tokens that end a reply.
    pub end_tokens: Slice<'a, u32>,
    /// For each reply, the tokens that precede it.
    pub starts: Slice<'a, u32>,
    /// For each reply, the pages of its own positions: `[replies, pages_per_reply]`.
    pub page_table: Slice<'a, u32>,
    /// Pages of a reply.
    pub pages_per_reply: usize,
    /// The most tokens of a reply.
    pub capacity: usize,
}

impl Bounds<'_> {
    fn check(&self, named: IndexSlice) -> Result<()> {
        named.check("starts of replies", self.starts.len())?;
        // The last token of a reply is in no page.
        room("pages of a reply", self.capacity.saturating_sub(1).div_ceil(PAGE), self.pages_per_reply)?;
        named.check("pages of replies", self.page_table.len() / self.pages_per_reply.max(1))
    }
}

/// What the next forward pass reads for each row.
#[derive(Debug)]
pub struct NextRows {
    /// The token.
    pub ids: Buffer<u32>,
    /// Its position.
    pub positions: Buffer<u32>,
    /// Its slot in the cache, page x 16 + lane, or -1 where the reply has ended.
    pub slots: Buffer<i32>,
    /// How many positions of the reply it attends to, its own included.
    pub lengths: Buffer<u32>,
}

impl NextRows {
    /// Of so many rows, without slots.
    ///
    /// # Errors
    /// As [`Device::zeroed`].
    pub fn new(device: &Device, rows: usize) -> Result<Self> {
        Ok(Self {
            ids: device.zeroed("tokens of rows", rows)?,
            positions: device.zeroed("positions of rows", rows)?,
            slots: device.upload("slots of rows", &vec![-1; rows])?,
            lengths: device.zeroed("lengths of rows", rows)?,
        })
    }

    fn check(&self, rows: usize) -> Result<()> {
        let lengths = [self.ids.len(), self.positions.len(), self.slots.len(), self.lengths.len()];
        lengths.into_iter().try_for_each(|length| room("rows of the next step", rows, length))
    }
}

/// Counts the drawn token of each row as its reply's, another one in every row, unless that has ended; ends replies that drew
/// an end token or are as long as may be, and says what comes next. A reply that ends attends to what is in the cache; later
/// launches change nothing of it.
///
/// # Errors
/// When lengths or replies do not fit, or the device has failed.
///
/// # Safety
/// The length of every reply that is [`LIVE`] must be below the capacity, in every replay too; so it is after this function
/// where it was before.
pub unsafe fn advance(
    device: &Device,
    rows: IndexSlice,
    drawn: &Drawn,
    bounds: Bounds,
    replies: &mut Replies,
    next: &mut NextRows,
) -> Result<()> {
    let (name, count) = ("advance_replies", rows.len());
    drawn.check(count)?;
    next.check(count)?;
    replies.check(rows)?;
    bounds.check(rows)?;
    let kernel = device.kernel(name)?;
    let launch = kernel.with(Shape::of(count.div_ceil(ADVANCE_THREADS), ADVANCE_THREADS)).read(rows);
    let launch = launch.read(&drawn.tokens).read(bounds.end_tokens);
    let launch = launch.value(side(name, bounds.end_tokens.len())?).value(side(name, bounds.capacity)?);
    let launch = launch.read(bounds.starts).read(bounds.page_table);
    let launch = launch.value(side(name, bounds.pages_per_reply)?).write(&mut replies.lengths);
    let launch = launch.write(&mut replies.finishes).write(&mut next.ids).write(&mut next.positions);
    let launch = launch.write(&mut next.slots).write(&mut next.lengths).value(side(name, count)?);
    // SAFETY: the parameters are those of the kernel; that a reply has a page for its next token is the caller's promise,
    // everything else was checked.
    unsafe { launch.launch() }
}

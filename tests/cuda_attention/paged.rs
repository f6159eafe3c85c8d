//! Attention over pages: decoding, and prefill in chunks.

use crate::cuda_emulator::device;
use crate::reference::{Format, Problem, assert_close, bits, forest, geometry, random_forest, values};
use half::bf16;
use rpt::cuda::attention::{Attention, Cached, PagedInputs, PagedTables};
use rpt::cuda::paged::{CachedSegment, Cut, PAGE, PagedPlan, PagedQuery};
use rpt::cuda::{Buffer, CudaError, Device, Slice, SliceMut};
use rpt::kernels::attention::Geometry;
use rpt::model::Forest;

/// The segments of a forest in pages, which lie in another order than their entries of the page table.
pub(crate) struct Layout {
    pub(crate) segments: Vec<CachedSegment>,
    pub(crate) page_table: Vec<u32>,
    /// For each segment of the forest, the segments from the root to it.
    pub(crate) paths: Vec<Vec<usize>>,
}

impl Layout {
    pub(crate) fn new(forest: &Forest) -> Self {
        let (mut segments, mut paths, mut pages) = (Vec::new(), Vec::<Vec<usize>>::new(), 0);
        for (number, segment) in forest.segments().iter().enumerate() {
            let mut path = segment.parent.map_or(Vec::new(), |parent| paths[parent].clone());
            path.push(number);
            paths.push(path);
            segments.push(CachedSegment { first_page: pages, positions: segment.length, grows: false });
            pages += segment.length.div_ceil(PAGE);
        }
        // Any permutation will do.
        let step = [7, 5, 3, 1].into_iter().find(|step| gcd(*step, pages) == 1).unwrap_or(1);
        let page_table = (0..pages).map(|page| ((page * step + 3) % pages) as u32).collect();
        Self { segments, page_table, paths }
    }

    /// Where a position of a segment lies: page x 16 + lane.
    pub(crate) fn slot(&self, segment: usize, at: usize) -> usize {
        self.page_table[self.segments[segment].first_page + at / PAGE] as usize * PAGE + at % PAGE
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// (segment, offset within it, packed row) of every row of a forest.
pub(crate) fn places<T: Format>(problem: &Problem<T>) -> Vec<(usize, usize, usize)> {
    let places = problem.plan(0, true).packed.places();
    let segments = problem.forest.segments().iter().enumerate();
    segments
        .flat_map(|(number, segment)| {
            let places = &places;
            (0..segment.length).map(move |at| (number, at, places[segment.row + at] as usize))
        })
        .collect()
}

/// Pages of keys and of values with what is in `kept` positions of each segment; elsewhere they are no numbers.
fn pages<T: Format>(
    problem: &Problem<T>,
    layout: &Layout,
    kept: impl Fn(usize) -> usize,
) -> (Vec<T>, Vec<T>) {
    let Geometry { heads, kv_heads, head_dim } = problem.geometry;
    let mut pages =
        [(); 2].map(|()| vec![T::of(f32::NAN); layout.page_table.len() * kv_heads * PAGE * head_dim]);
    for (segment, at, row) in places(problem).into_iter().filter(|(segment, at, _)| *at < kept(*segment)) {
        let slot = layout.slot(segment, at);
        for (operand, pages) in pages.iter_mut().enumerate() {
            for head in 0..kv_heads {
                let from = row * problem.width() + (heads + operand * kv_heads + head) * head_dim;
                let to = ((slot / PAGE * kv_heads + head) * PAGE + slot % PAGE) * head_dim;
                pages[to..to + head_dim].copy_from_slice(&problem.qkv[from..from + head_dim]);
            }
        }
    }
    pages.into()
}

/// Paged attention with all buffers at hand.
pub(crate) struct Paged<S: Cached> {
    pub(crate) attention: Attention,
    pub(crate) tables: PagedTables,
    pub(crate) queries: Buffer<S::Widened>,
    pub(crate) keys: Buffer<S>,
    pub(crate) values: Buffer<S>,
    pub(crate) scales: Option<(Buffer<f32>, Buffer<f32>)>,
    pub(crate) page_table: Buffer<u32>,
    pub(crate) lengths: Buffer<u32>,
    statistics: Buffer<f32>,
    partials: Buffer<f32>,
    pub(crate) out: Buffer<S::Widened>,
}

impl<S: Cached> Paged<S> {
    pub(crate) fn new(
        device: &Device,
        geometry: Geometry,
        plan: &PagedPlan,
        page_table: &[u32],
        queries: &[S::Widened],
        (keys, values): (&[S], &[S]),
    ) -> Self {
        let tables = PagedTables::upload(device, plan).unwrap();
        let rows = queries.len() / ((geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim);
        Self {
            attention: Attention::new(device, geometry, false).unwrap(),
            queries: device.upload("queries", queries).unwrap(),
            keys: device.upload("keys", keys).unwrap(),
            values: device.upload("values", values).unwrap(),
            scales: None,
            page_table: device.upload("page table", page_table).unwrap(),
            lengths: device.zeroed("lengths", rows).unwrap(),
            statistics: device.allocate("statistics", tables.statistics(geometry)).unwrap(),
            partials: device.allocate("partials", tables.values(geometry)).unwrap(),
            out: device.allocate("out", rows * geometry.heads * geometry.head_dim).unwrap(),
            tables,
        }
    }

    pub(crate) fn launch(&mut self) -> Result<(), CudaError> {
        let Geometry { heads, kv_heads, head_dim } = self.attention.geometry();
        let inputs = PagedInputs {
            queries: Slice::from(&self.queries),
            stride: (heads + 2 * kv_heads) * head_dim,
            keys: Slice::from(&self.keys),
            values: Slice::from(&self.values),
            scales: self.scales.as_ref().map(|(keys, values)| (Slice::from(keys), Slice::from(values))),
            page_table: Slice::from(&self.page_table),
            lengths: Slice::from(&self.lengths),
        };
        let (statistics, partials) =
            (&mut SliceMut::from(&mut self.statistics), &mut SliceMut::from(&mut self.partials));
        // SAFETY: the plan was made for these pages and rows.
        unsafe {
            self.attention.paged(
                &self.tables,
                &inputs,
                statistics,
                partials,
                &mut SliceMut::from(&mut self.out),
            )
        }
    }
}

/// Every row of a forest as a query, as if it were prefilled in one chunk.
fn all_rows<T: Format + Cached<Widened = T>>(problem: &Problem<T>, cut: Cut) -> Vec<T> {
    let layout = Layout::new(&problem.forest);
    let places = places(problem);
    let queries: Vec<PagedQuery> = places
        .iter()
        .map(|(segment, at, row)| PagedQuery { row: *row, path: &layout.paths[*segment], visible: at + 1 })
        .collect();
    let group = problem.geometry.heads / problem.geometry.kv_heads;
    let plan = PagedPlan::new(&layout.segments, &queries, group, cut).unwrap();
    let (keys, values) = pages(problem, &layout, |_| usize::MAX);
    let pages = (keys.as_slice(), values.as_slice());
    let mut paged =
        Paged::<T>::new(&device(), problem.geometry, &plan, &layout.page_table, &problem.qkv, pages);
    paged.launch().unwrap();
    paged.out.download().unwrap()
}

const SHAPES: [(usize, usize, usize); 8] =
    [(4, 2, 64), (7, 1, 32), (70, 1, 16), (1, 1, 256), (2, 2, 80), (3, 1, 96), (2, 1, 128), (2, 2, 160)];

fn agrees<T: Format + Cached<Widened = T>>(seed: u64) {
    for (number, (heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        let forest = random_forest(seed + number as u64, 110);
        let problem = Problem::<T>::new(geometry(heads, kv_heads, dim), forest, 4);
        let expected = problem.forward(&values(&problem.qkv)).0;
        let cut = [Cut::Fast { keys: 64 }, Cut::Fast { keys: 4096 }, Cut::Invariant][number % 3];
        let found = all_rows(&problem, cut);
        assert_close(&values(&found), &expected, T::OUT, &format!("{heads} {kv_heads} {dim} {cut:?}"));
    }
}

#[test]
fn f32_agrees_with_the_rule_of_who_sees_whom() {
    agrees::<f32>(500);
}

#[test]
fn bf16_agrees_with_the_rule_of_who_sees_whom() {
    agrees::<bf16>(600);
}

fn training_and_prefill<T: Format + Cached<Widened = T>>(geometry: Geometry, forest: Forest) {
    let problem = Problem::<T>::new(geometry, forest, 12);
    let trained = problem.run(&device(), true).out.download().unwrap();
    assert!(bits(&trained) == bits(&all_rows(&problem, Cut::Invariant)));
}

#[test]
fn training_and_paged_prefill_have_the_same_bits() {
    let long = [(None, 530), (Some(0), 20), (Some(1), 10), (Some(1), 70), (Some(0), 3), (None, 33)];
    training_and_prefill::<f32>(geometry(2, 1, 16), forest(&long));
    training_and_prefill::<bf16>(geometry(4, 2, 64), forest(&long));
    training_and_prefill::<bf16>(geometry(3, 1, 80), random_forest(40, 120));
    training_and_prefill::<bf16>(geometry(1, 1, 256), random_forest(41, 120));
    training_and_prefill::<f32>(geometry(5, 1, 96), random_forest(42, 120));
}

#[test]
fn a_chain_of_many_short_segments_agrees() {
    let chain: Vec<_> = (0..140).map(|at: usize| (at.checked_sub(1), at % 3)).collect();
    let problem = Problem::<bf16>::new(geometry(2, 1, 16), forest(&chain), 2);
    let expected = problem.forward(&values(&problem.qkv)).0;
    // All in one item; as many partial results as segments.
    for cut in [Cut::Fast { keys: 4096 }, Cut::Invariant] {
        assert_close(&values(&all_rows(&problem, cut)), &expected, bf16::OUT, &format!("{cut:?}"));
    }
    training_and_prefill::<f32>(geometry(1, 1, 16), forest(&chain));
}

/// Decodes the leaves of a forest one position at a time by replaying one graph; every row of them has the bits of
/// training.
fn replies<T: Format + Cached<Widened = T>>(geometry: Geometry, trunk: usize) {
    let segments = [(None, trunk), (Some(0), 17), (Some(1), 6), (Some(1), 6), (Some(0), 6), (None, 6)];
    let leaves = [2, 3, 4, 5];
    let problem = Problem::<T>::new(geometry, forest(&segments), 21);
    let trained = problem.run(&device(), true).out.download().unwrap();
    let mut layout = Layout::new(&problem.forest);
    for leaf in leaves {
        layout.segments[leaf].grows = true;
        layout.segments[leaf].positions = PAGE; // room for more than will come
    }
    let queries: Vec<PagedQuery> = leaves
        .iter()
        .enumerate()
        .map(|(row, leaf)| PagedQuery { row, path: &layout.paths[*leaf], visible: 0 })
        .collect();
    let group = geometry.heads / geometry.kv_heads;
    let plan = PagedPlan::new(&layout.segments, &queries, group, Cut::Invariant).unwrap();
    let (device, width, out_width) = (device(), problem.width(), geometry.heads * geometry.head_dim);
    let (keys, values) = pages(&problem, &layout, |_| 0);
    let none = vec![T::of(f32::NAN); leaves.len() * width];
    let mut paged = Paged::<T>::new(&device, geometry, &plan, &layout.page_table, &none, (&keys, &values));
    let graph = device.record(|| paged.launch()).unwrap();
    for at in 0..6 {
        let kept = |segment: usize| if leaves.contains(&segment) { at + 1 } else { usize::MAX };
        let (keys, values) = pages(&problem, &layout, kept);
        let rows: Vec<usize> = places(&problem)
            .into_iter()
            .filter(|(segment, offset, _)| leaves.contains(segment) && *offset == at)
            .map(|(_, _, row)| row)
            .collect();
        let queries: Vec<T> =
            rows.iter().flat_map(|row| problem.qkv[row * width..][..width].to_vec()).collect();
        paged.keys.upload(&keys).unwrap();
        paged.values.upload(&values).unwrap();
        paged.queries.upload(&queries).unwrap();
        paged.lengths.upload(&[at as u32 + 1; 4]).unwrap();
        graph.launch().unwrap();
        let expected: Vec<T> =
            rows.iter().flat_map(|row| trained[row * out_width..][..out_width].to_vec()).collect();
        assert!(bits(&paged.out.download().unwrap()) == bits(&expected), "position {at}");
    }
}

#[test]
fn decoding_by_a_replayed_graph_has_the_bits_of_training() {
    replies::<f32>(geometry(2, 1, 16), 70);
    replies::<bf16>(geometry(4, 2, 64), 520);
    replies::<bf16>(geometry(7, 1, 128), 5);
}

#[test]
fn what_does_not_fit_is_refused() {
    let problem = Problem::<bf16>::new(geometry(2, 1, 16), forest(&[(None, 5)]), 1);
    let layout = Layout::new(&problem.forest);
    let queries = [PagedQuery { row: 0, path: &[0], visible: 1 }];
    let plan = PagedPlan::new(&layout.segments, &queries, 2, Cut::Invariant).unwrap();
    let pages = vec![0u8; PAGE * 16];
    let mut paged = Paged::<u8>::new(
        &device(),
        problem.geometry,
        &plan,
        &layout.page_table,
        &problem.qkv,
        (&pages, &pages),
    );
    assert!(matches!(paged.launch(), Err(CudaError::Length { what: "scales of cached keys", .. })));
}

//! Work beside other work, on a device's second stream.

use super::device::{Context, Device};
use super::error::{CudaError, Result};
use super::event::Event;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Work that a device does beside what is asked for while this lives. When it is dropped, what is asked for afterwards
/// comes behind that work.
#[derive(Debug)]
#[must_use = "what is dropped at once is beside nothing"]
pub struct Beside {
    context: Arc<Context>,
    end: Event,
}

impl Device {
    /// Asks for what `work` asks for behind all that is before the mark `start`, and beside what is asked for until the
    /// returned [`Beside`] is dropped. Nobody else may ask for anything while `work` runs.
    ///
    /// # Errors
    /// Those of `work`; while a graph is recorded; when the device has failed.
    ///
    /// # Safety
    /// From `start` until [`Beside`] is dropped nobody may use what the work writes on the device, nor change or release what
    /// it uses.
    pub unsafe fn beside<T, E: From<CudaError>>(
        &self,
        start: &Event,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(Beside, T), E> {
        self.context.refuse_recording("work beside it")?;
        start.hold(self.context.second)?;
        let beside = Beside { context: Arc::clone(&self.context), end: self.event()? };
        let turn = Turn::begin(&self.context);
        let done = work()?;
        drop(turn);
        Ok((beside, done))
    }
}

impl Beside {
    fn join(&self) -> Result<()> {
        self.context.refuse_recording("waiting for work beside it")?;
        self.end.record_on(self.context.second)?;
        self.end.hold(self.context.first)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // What fails here is a failure of the device, which every later call reports.
        let _ = self.join();
    }
}

/// While it lives, work goes to the second stream.
struct Turn<'a> {
    context: &'a Context,
    before: bool,
}

impl<'a> Turn<'a> {
    fn begin(context: &'a Context) -> Self {
        Self { context, before: context.beside.swap(true, Ordering::Relaxed) }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.context.beside.store(self.before, Ordering::Relaxed);
    }
}

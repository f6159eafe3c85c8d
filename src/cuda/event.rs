//! Marks in a device's work, to wait for and to measure between.

use super::device::{Context, Device, handle};
use super::error::Result;
use cudarc::driver::sys;
use std::sync::Arc;

/// A mark in a device's work.
#[derive(Debug)]
pub struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: the handle belongs to the process; methods make the context current on the calling thread.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks what concurrent calls share.
unsafe impl Sync for Event {}

impl Device {
    /// A mark that is nowhere yet.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn event(&self) -> Result<Event> {
        self.context.make_current()?;
        let raw = handle("cuEventCreate", |event| {
            // SAFETY: `event` is writable, a context current.
            unsafe { sys::cuEventCreate(event, 0) }
        })?;
        Ok(Event { context: Arc::clone(&self.context), raw })
    }
}

impl Event {
    /// Puts the mark behind all work that was asked for before, but for what is beside it.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn record(&self) -> Result<()> {
        self.context.refuse_recording("a mark")?;
        self.record_on(self.context.stream())
    }

    /// Puts the mark behind all work that was asked of one of the context's streams.
    pub(super) fn record_on(&self, stream: sys::CUstream) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: event and stream live as long as `self`.
        self.context.check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream) })
    }

    /// Holds back what is asked of one of the context's streams from now on until the work before the mark has been done.
    pub(super) fn hold(&self, stream: sys::CUstream) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: as above; the driver wants 0 for flags.
        self.context.check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, self.raw, 0) })
    }

    /// Waits until the work before the mark has been done; not at all for one that is nowhere.
    ///
    /// # Errors
    /// When any of that work has failed.
    pub fn wait(&self) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: the event lives as long as `self`.
        self.context.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }

    /// Milliseconds that the device took from `earlier` to this mark; waits for it.
    ///
    /// # Errors
    /// When one of the two is nowhere, or work before it has failed.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32> {
        self.wait()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events live; `milliseconds` is writable.
        let status = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, earlier.raw, self.raw) };
        self.context.check("cuEventElapsedTime", status)?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by `Device::event` and destroyed once; the driver waits for work that still needs it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

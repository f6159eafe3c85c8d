//! Graphs: work that is recorded once and then launched as a whole, which costs the host one call.

use super::buffer::{Allocation, PinnedMemory};
use super::device::{Context, Device, handle};
use super::error::{CudaError, Result};
use cudarc::driver::sys;
use std::ptr;
use std::sync::Arc;

/// What belongs to a graph under construction.
#[derive(Debug, Default)]
pub(super) struct Recording {
    memory: Vec<Arc<Allocation>>,
    pinned: Vec<Arc<PinnedMemory>>,
    released: Vec<sys::CUdeviceptr>,
}

impl Recording {
    pub(super) fn keep(&mut self, allocation: &Arc<Allocation>) {
        if !self.memory.iter().any(|kept| Arc::ptr_eq(kept, allocation)) {
            self.memory.push(Arc::clone(allocation));
        }
    }

    pub(super) fn keep_pinned(&mut self, memory: &Arc<PinnedMemory>) {
        self.pinned.push(Arc::clone(memory));
    }

    /// Memory cannot be released while a graph is recorded.
    pub(super) fn release_later(&mut self, pointer: sys::CUdeviceptr) {
        self.released.push(pointer);
    }
}

/// Recorded work. It keeps the memory that it uses; each launch reads what is in it then.
#[derive(Debug)]
pub struct Graph {
    context: Arc<Context>,
    executable: sys::CUgraphExec,
    pinned: Vec<Arc<PinnedMemory>>,
    _memory: Vec<Arc<Allocation>>,
}

// SAFETY: the handle belongs to the process; methods make the context current on the calling thread.
unsafe impl Send for Graph {}

impl Device {
    /// Records the launches and copies that `work` asks for on this thread, which do not happen now. Nobody else may use
    /// the device meanwhile; allocations and waiting are refused.
    ///
    /// # Errors
    /// Those of `work`, and when the driver does not accept the graph.
    pub fn record<E: From<CudaError>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        let capture = Capture::begin(&self.context)?;
        work()?;
        Ok(capture.finish()?)
    }
}

/// Ends the recording also when the work fails or panics.
struct Capture<'a> {
    context: &'a Arc<Context>,
}

impl<'a> Capture<'a> {
    fn begin(context: &'a Arc<Context>) -> Result<Self> {
        context.refuse_recording("another graph")?;
        context.make_current()?;
        // Relaxed: what must not happen meanwhile is refused here, and the driver may load what it needs.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as the context.
        let status = unsafe { sys::cuStreamBeginCapture_v2(context.stream(), mode) };
        context.check("cuStreamBeginCapture", status)?;
        *context.recording() = Some(Recording::default());
        Ok(Self { context })
    }

    /// The graph as recorded, and what it uses.
    fn end(&self) -> (Result<RawGraph>, Recording) {
        let mut graph = ptr::null_mut();
        // SAFETY: this thread began the capture; `graph` is writable.
        let status = unsafe { sys::cuStreamEndCapture(self.context.stream(), &raw mut graph) };
        let recording = self.context.recording().take().unwrap_or_default();
        for pointer in &recording.released {
            self.context.release(*pointer);
        }
        (self.context.check("cuStreamEndCapture", status).map(|()| RawGraph(graph)), recording)
    }

    fn finish(self) -> Result<Graph> {
        let (graph, recording) = self.end();
        let graph = graph?;
        let executable = handle("cuGraphInstantiate", |executable| {
            // SAFETY: the graph was captured just now; `executable` is writable.
            unsafe { sys::cuGraphInstantiateWithFlags(executable, graph.0, 0) }
        })?;
        Ok(Graph {
            context: Arc::clone(self.context),
            executable,
            pinned: recording.pinned,
            _memory: recording.memory,
        })
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.context.recording().is_some() {
            drop(self.end());
        }
    }
}

struct RawGraph(sys::CUgraph);

impl Drop for RawGraph {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the driver made it, and what was instantiated from it does not need it.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

impl Graph {
    /// Asks the device to do the recorded work.
    ///
    /// # Errors
    /// While another graph is recorded, or when the device has failed.
    pub fn launch(&self) -> Result<()> {
        self.context.refuse_recording("a graph")?;
        self.context.make_current()?;
        // SAFETY: the memory that the graph uses is kept by `self`.
        let status = unsafe { sys::cuGraphLaunch(self.executable, self.context.stream()) };
        self.context.check("cuGraphLaunch", status)?;
        self.pinned.iter().try_for_each(|memory| memory.mark())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by the driver and destroyed once; launches under way are finished first by the driver.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

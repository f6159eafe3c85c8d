//! The order in which positions become tasks.

use super::draw::Permutation;
use super::{Task, TaskDocument, TaskShards, TasksError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where a stream of tasks stands: the next task to issue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskCursor {
    /// Passes over the shards that are complete.
    pub epoch: u64,
    /// Documents of this epoch, in its order, that are complete.
    pub row: u64,
    /// Positions of the document at `row` that are issued.
    pub position: u64,
    /// Tasks issued since the beginning.
    pub ordinal: u64,
}

/// Issues tasks without end.
///
/// Every epoch visits every document once, in a pseudo-random order keyed by (seed, epoch); the
/// positions of a document come one after another, so that they share their context. The order is
/// a pure function of the seed, and a stream that starts at a cursor goes on as the one that left
/// it there. Memory: one document.
#[derive(Debug)]
pub struct TaskStream {
    shards: Arc<TaskShards>,
    seed: u64,
    cursor: TaskCursor,
    /// The document at the cursor.
    document: Arc<TaskDocument>,
}

impl TaskStream {
    /// Starts at a cursor ([`TaskCursor::default`] is the beginning).
    ///
    /// # Errors
    /// Fails when the cursor points outside of the shards, or they are damaged.
    pub fn new(shards: Arc<TaskShards>, seed: u64, cursor: TaskCursor) -> Result<Self, TasksError> {
        let document = document_at(&shards, seed, cursor)?;
        let positions = document.positions.len() as u64;
        if cursor.position >= positions {
            let path = shards.directory().to_owned();
            return Err(TasksError::OutOfRange {
                path,
                what: "position",
                index: cursor.position,
                count: positions,
            });
        }
        Ok(Self { shards, seed, cursor, document })
    }

    /// The next task to issue.
    pub fn cursor(&self) -> TaskCursor {
        self.cursor
    }

    /// Issues a task.
    ///
    /// # Errors
    /// Fails when the shards are damaged; the cursor then stays where it is.
    pub fn next_task(&mut self) -> Result<Task, TasksError> {
        let TaskCursor { epoch, position, ordinal, .. } = self.cursor;
        let task = Task { ordinal, epoch, document: Arc::clone(&self.document), position: position as usize };
        let next = self.successor();
        if next.position == 0 {
            self.document = document_at(&self.shards, self.seed, next)?;
        }
        self.cursor = next;
        Ok(task)
    }

    fn successor(&self) -> TaskCursor {
        let TaskCursor { epoch, row, position, ordinal } = self.cursor;
        let ordinal = ordinal + 1;
        if position + 1 < self.document.positions.len() as u64 {
            TaskCursor { epoch, row, position: position + 1, ordinal }
        } else if row + 1 < self.shards.documents() {
            TaskCursor { epoch, row: row + 1, position: 0, ordinal }
        } else {
            TaskCursor { epoch: epoch + 1, row: 0, position: 0, ordinal }
        }
    }
}

fn document_at(shards: &TaskShards, seed: u64, cursor: TaskCursor) -> Result<Arc<TaskDocument>, TasksError> {
    let count = shards.documents();
    if cursor.row >= count {
        let path = shards.directory().to_owned();
        return Err(TasksError::OutOfRange { path, what: "row", index: cursor.row, count });
    }
    let order = Permutation::new(count, &[seed, cursor.epoch]);
    shards.document(order.at(cursor.row)).map(Arc::new)
}

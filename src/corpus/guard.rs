//! Running a decoder that may panic on damaged input.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the decoder; its errors and its panics on damaged input become the reason.
pub(super) fn guarded<T, E: Display>(work: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(payload) => Err(format!("the decoder gave up: {}", panic_message(payload.as_ref()))),
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_decoder_becomes_a_reason() {
        let row = 7;
        let formatted = guarded(|| -> Result<(), String> { panic!("damaged page {row}") });
        assert_eq!(formatted.unwrap_err(), "the decoder gave up: damaged page 7");
        let literal = guarded(|| -> Result<(), String> { panic!("damaged") });
        assert_eq!(literal.unwrap_err(), "the decoder gave up: damaged");
    }
}

//! A tokenizer.json, and what it does to a text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rpt::config::TokenizerConfig;
use rpt::tokenize::{SpecialTokens, Tokenizer};
use rpt_fuzz::{directory, write};

fuzz_target!(
    // Panics of the tokenizers library are caught and are errors; those of our own still end the process.
    init: std::panic::set_hook(Box::new(|_| {})),
    |bytes: &[u8]| {
        write("tokenizer.json", bytes);
        if let Ok(tokenizer) = Tokenizer::load(&directory().join("tokenizer.json")) {
            let _ = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default());
            for text in ["", "Hello  12 na\u{ef}ve\n", "aaaaaaaaaaaaaaaaaaaa!"] {
                for ids in [tokenizer.encode_document(text), tokenizer.encode_control(text)].into_iter().flatten() {
                    assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
                }
            }
        }
    }
);

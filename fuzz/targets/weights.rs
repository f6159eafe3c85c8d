//! A safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rpt::model::Decoder;
use rpt_fuzz::{CONFIG, directory, write};

fuzz_target!(|bytes: &[u8]| {
    write("config.json", CONFIG.as_bytes());
    write("model.safetensors", bytes);
    let _ = Decoder::load(directory());
});

//! The index of a sharded model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rpt::model::{Decoder, directory_digest};
use rpt_fuzz::{CONFIG, directory, write};

fuzz_target!(|bytes: &[u8]| {
    write("config.json", CONFIG.as_bytes());
    write("a.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    write("model.safetensors.index.json", bytes);
    let _ = directory_digest(directory());
    let _ = Decoder::load(directory());
});

//! config.json and generation_config.json.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rpt::model::{DecoderConfig, Layout};
use rpt_fuzz::{directory, write};

fuzz_target!(|bytes: &[u8]| {
    write("config.json", bytes);
    if let Ok(config) = DecoderConfig::load(directory()) {
        assert!(!Layout::new(&config).is_empty());
    }
});

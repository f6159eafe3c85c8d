//! A chat template.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rpt::tokenize::{ChatTemplate, Message};
use rpt_fuzz::{directory, write};

fuzz_target!(|bytes: &[u8]| {
    write("chat_template.jinja", bytes);
    if let Ok(Some(template)) = ChatTemplate::load(directory()) {
        let _ = template.render(&[Message::user("Hello")], true);
    }
});

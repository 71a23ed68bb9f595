//! SPDY/3.1 frames: whatever a client sends, cut anywhere, gives events or an error, and every event takes bytes. The first
//! byte says where it is cut.
#![no_main]

use bytes::BytesMut;
use cri_shim_streaming::spdy::frame::{Decoder, Encoder, Event, Frame, MAX_DATA};
use libfuzzer_sys::fuzz_target;

fn decode(decoder: &mut Decoder, buffer: &mut BytesMut, events: &mut Vec<Event>) -> bool {
    loop {
        let before = buffer.len();
        match decoder.decode(buffer) {
            Ok(Some(event)) => {
                if let Event::Data { bytes, .. } = &event {
                    assert!(bytes.len() <= MAX_DATA);
                }
                assert!(buffer.len() < before || matches!(event, Event::Data { .. }), "an event takes bytes");
                events.push(event);
            }
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Events without the places where data was cut.
fn whole(events: Vec<Event>) -> Vec<Event> {
    let mut all: Vec<Event> = Vec::new();
    for event in events {
        if let (Some(Event::Data { id: last, bytes: have, fin: ended }), Event::Data { id, bytes, fin }) =
            (all.last_mut(), &event)
            && last == id
            && !*ended
        {
            *have = [&have[..], &bytes[..]].concat().into();
            *ended = *fin;
            continue;
        }
        all.push(event);
    }
    all
}

fuzz_target!(|input: &[u8]| {
    let Some((cut, bytes)) = input.split_first() else { return };
    let mut at_once = Vec::new();
    let fine = decode(&mut Decoder::default(), &mut BytesMut::from(bytes), &mut at_once);
    let (mut decoder, mut buffer, mut in_pieces, mut also) =
        (Decoder::default(), BytesMut::new(), Vec::new(), true);
    for piece in bytes.chunks(usize::from(*cut).max(1)) {
        buffer.extend_from_slice(piece);
        also = decode(&mut decoder, &mut buffer, &mut in_pieces);
        if !also {
            break;
        }
    }
    assert_eq!(fine, also, "an error does not depend on where the bytes were cut");
    let at_once = whole(at_once);
    // What a peer opened can be said again, and is understood the same way.
    for event in &at_once {
        if let Event::SynStream { id, headers, .. } = event {
            let (mut encoder, mut wire) = (Encoder::default(), BytesMut::new());
            if encoder.encode(&Frame::SynStream { id: *id, headers: headers.clone() }, &mut wire).is_ok() {
                let mut again = Vec::new();
                if decode(&mut Decoder::default(), &mut wire, &mut again) {
                    let [Event::SynStream { headers: understood, .. }] = &again[..] else {
                        panic!("{again:?}")
                    };
                    assert_eq!(understood, headers);
                }
            }
        }
    }
    if fine {
        assert_eq!(at_once, whole(in_pieces));
    }
});

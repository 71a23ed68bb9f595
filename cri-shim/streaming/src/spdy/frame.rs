//! SPDY/3.1 frames: bytes to [`Event`]s and [`Frame`]s to bytes. It does no IO and keeps only the zlib states.
//!
//! Data frames are handed on in the pieces they arrive in, so their length needs no buffer; control frames are bounded.
//! Layout: <https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/> section 2.6.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::SpdyError;
use super::headers::{HeaderReader, HeaderWriter, Headers};

/// Most bytes of a control frame's body.
pub const MAX_CONTROL: usize = 16 * 1024;

/// Most bytes of data handed on or sent at once.
pub const MAX_DATA: usize = 32 * 1024;

/// Marks the last frame of a stream's direction.
const FLAG_FIN: u8 = 1;

/// SETTINGS entry: bytes that may be sent on a new stream before its first WINDOW_UPDATE.
const INITIAL_WINDOW_SIZE: u32 = 7;

/// What a peer sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A new stream.
    SynStream {
        /// Its id.
        id: u32,
        /// What it is for.
        headers: Headers,
        /// The peer will send nothing on it.
        fin: bool,
    },
    /// Part of a stream's data.
    Data {
        /// The stream.
        id: u32,
        /// The bytes, at most [`MAX_DATA`].
        bytes: Bytes,
        /// The peer will send nothing more on it.
        fin: bool,
    },
    /// A stream was cut.
    Reset {
        /// The stream.
        id: u32,
    },
    /// A question to be answered with the same id, or an answer.
    Ping(u32),
    /// The peer opens no more streams.
    GoAway,
    /// The peer does flow control, with this initial window where it names one.
    Settings {
        /// Bytes per new stream.
        initial_window: Option<u32>,
    },
    /// More may be sent on a stream.
    WindowUpdate {
        /// The stream.
        id: u32,
        /// How many bytes more.
        delta: u32,
    },
    /// A frame that needs no action (an answer's headers, or a type we do not know).
    Ignored,
}

/// What we send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream; only clients do.
    SynStream {
        /// Its id.
        id: u32,
        /// What it is for.
        headers: Headers,
    },
    /// Accepts a stream.
    SynReply {
        /// The stream.
        id: u32,
    },
    /// Data of a stream.
    Data {
        /// The stream.
        id: u32,
        /// The bytes.
        bytes: Bytes,
        /// Nothing follows.
        fin: bool,
    },
    /// Cuts a stream.
    Reset {
        /// The stream.
        id: u32,
        /// Why, section 2.6.3.
        status: u32,
    },
    /// A question, or the answer to one.
    Ping(u32),
    /// We take no more streams.
    GoAway {
        /// The last stream that was taken.
        last: u32,
    },
    /// We took data of a stream, so that more may come.
    WindowUpdate {
        /// The stream.
        id: u32,
        /// How many bytes more.
        delta: u32,
    },
}

/// Reads one peer's frames.
pub struct Decoder {
    headers: HeaderReader,
    /// The data frame whose bytes are arriving: stream, bytes still to come, last frame.
    data: Option<(u32, usize, bool)>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { headers: HeaderReader::new(), data: None }
    }
}

impl Decoder {
    /// Takes the next event off `buffer`; `None` when more bytes are needed.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, SpdyError> {
        if let Some((id, left, last)) = self.data {
            return Ok(self.data_piece(buffer, id, left, last));
        }
        if buffer.len() < 8 {
            return Ok(None);
        }
        let head = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]);
        let flags = buffer[4];
        let length = usize::from(buffer[5]) << 16 | usize::from(buffer[6]) << 8 | usize::from(buffer[7]);
        if head >> 31 == 0 {
            buffer.advance(8);
            return Ok(self.data_piece(buffer, head, length, flags & FLAG_FIN != 0));
        }
        if length > MAX_CONTROL {
            return Err(SpdyError::TooLong("control frame"));
        }
        if buffer.len() < 8 + length {
            return Ok(None);
        }
        buffer.advance(8);
        let body = buffer.split_to(length).freeze();
        if (head >> 16) & 0x7fff != 3 {
            return Err(SpdyError::Version((head >> 16) & 0x7fff));
        }
        self.control(head & 0xffff, flags, body).map(Some)
    }

    fn data_piece(&mut self, buffer: &mut BytesMut, id: u32, left: usize, last: bool) -> Option<Event> {
        let take = left.min(buffer.len()).min(MAX_DATA);
        if take == 0 && left > 0 {
            self.data = Some((id, left, last));
            return None;
        }
        let left = left - take;
        self.data = (left > 0).then_some((id, left, last));
        Some(Event::Data { id, bytes: buffer.split_to(take).freeze(), fin: last && left == 0 })
    }

    fn control(&mut self, kind: u32, flags: u8, mut body: Bytes) -> Result<Event, SpdyError> {
        match kind {
            1 => {
                let id = take_id(&mut body, "SYN_STREAM")?;
                // The associated stream, the priority and the credential slot.
                if body.len() < 6 {
                    return Err(SpdyError::Malformed("SYN_STREAM"));
                }
                body.advance(6);
                Ok(Event::SynStream { id, headers: self.headers.read(&body)?, fin: flags & FLAG_FIN != 0 })
            }
            // Every block must pass through the zlib state, wanted or not.
            2 | 8 => {
                take_id(&mut body, "SYN_REPLY or HEADERS")?;
                self.headers.read(&body)?;
                Ok(Event::Ignored)
            }
            3 => Ok(Event::Reset { id: take_id(&mut body, "RST_STREAM")? }),
            4 => settings(body),
            6 => body.try_get_u32().map(Event::Ping).map_err(|_cause| SpdyError::Malformed("PING")),
            7 => Ok(Event::GoAway),
            9 => {
                let id = take_id(&mut body, "WINDOW_UPDATE")?;
                let delta = body.try_get_u32().map_err(|_cause| SpdyError::Malformed("WINDOW_UPDATE"))?;
                Ok(Event::WindowUpdate { id, delta: delta & 0x7fff_ffff })
            }
            _ => Ok(Event::Ignored),
        }
    }
}

fn take_id(body: &mut Bytes, frame: &'static str) -> Result<u32, SpdyError> {
    body.try_get_u32().map(|id| id & 0x7fff_ffff).map_err(|_cause| SpdyError::Malformed(frame))
}

fn settings(mut body: Bytes) -> Result<Event, SpdyError> {
    let wrong = |_| SpdyError::Malformed("SETTINGS");
    let count = body.try_get_u32().map_err(wrong)?;
    let mut initial_window = None;
    // A claimed count beyond the frame's bytes ends the loop with an error.
    for _ in 0..count {
        let id = body.try_get_u32().map_err(wrong)? & 0x00ff_ffff;
        let value = body.try_get_u32().map_err(wrong)?;
        if id == INITIAL_WINDOW_SIZE {
            initial_window = Some(value & 0x7fff_ffff);
        }
    }
    Ok(Event::Settings { initial_window })
}

/// Writes frames for one peer.
pub struct Encoder(HeaderWriter);

impl Default for Encoder {
    fn default() -> Self {
        Self(HeaderWriter::new())
    }
}

impl Encoder {
    /// Appends `frame` to `buffer`.
    pub fn encode(&mut self, frame: &Frame, buffer: &mut BytesMut) -> Result<(), SpdyError> {
        match frame {
            Frame::Data { id, bytes, fin } => {
                buffer.put_u32(*id);
                put_length(buffer, if *fin { FLAG_FIN } else { 0 }, bytes.len())?;
                buffer.put_slice(bytes);
            }
            Frame::SynStream { id, headers } => {
                let block = self.0.write(headers)?;
                control(buffer, 1, 10 + block.len())?;
                buffer.put_u32(*id);
                buffer.put_slice(&[0; 6]);
                buffer.put_slice(&block);
            }
            Frame::SynReply { id } => {
                let block = self.0.write(&Headers::new())?;
                control(buffer, 2, 4 + block.len())?;
                buffer.put_u32(*id);
                buffer.put_slice(&block);
            }
            Frame::Reset { id, status } => pair(buffer, 3, *id, *status)?,
            Frame::Ping(id) => {
                control(buffer, 6, 4)?;
                buffer.put_u32(*id);
            }
            Frame::GoAway { last } => pair(buffer, 7, *last, 0)?,
            Frame::WindowUpdate { id, delta } => pair(buffer, 9, *id, *delta)?,
        }
        Ok(())
    }
}

fn pair(buffer: &mut BytesMut, kind: u16, first: u32, second: u32) -> Result<(), SpdyError> {
    control(buffer, kind, 8)?;
    buffer.put_u32(first);
    buffer.put_u32(second);
    Ok(())
}

fn control(buffer: &mut BytesMut, kind: u16, length: usize) -> Result<(), SpdyError> {
    buffer.put_u16(0x8003);
    buffer.put_u16(kind);
    put_length(buffer, 0, length)
}

fn put_length(buffer: &mut BytesMut, flags: u8, length: usize) -> Result<(), SpdyError> {
    let length =
        u32::try_from(length).ok().filter(|length| *length < 1 << 24).ok_or(SpdyError::TooLong("frame"))?;
    buffer.put_u32(u32::from(flags) << 24 | length);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_all(decoder: &mut Decoder, buffer: &mut BytesMut) -> Result<Vec<Event>, SpdyError> {
        let mut events = Vec::new();
        while let Some(event) = decoder.decode(buffer)? {
            events.push(event);
        }
        Ok(events)
    }

    #[test]
    fn every_frame_is_understood_by_the_other_side() {
        let headers = vec![("streamtype".to_owned(), "stdout".to_owned())];
        let cases = [
            (
                Frame::SynStream { id: 1, headers: headers.clone() },
                Event::SynStream { id: 1, headers, fin: false },
            ),
            (Frame::SynReply { id: 1 }, Event::Ignored),
            (
                Frame::Data { id: 1, bytes: Bytes::from_static(b"x"), fin: true },
                Event::Data { id: 1, bytes: Bytes::from_static(b"x"), fin: true },
            ),
            (Frame::Reset { id: 3, status: 5 }, Event::Reset { id: 3 }),
            (Frame::Ping(7), Event::Ping(7)),
            (Frame::GoAway { last: 1 }, Event::GoAway),
            (Frame::WindowUpdate { id: 1, delta: 9 }, Event::WindowUpdate { id: 1, delta: 9 }),
        ];
        let (mut encoder, mut decoder, mut buffer) =
            (Encoder::default(), Decoder::default(), BytesMut::new());
        for (frame, event) in cases {
            encoder.encode(&frame, &mut buffer).expect("encoded");
            assert_eq!(decode_all(&mut decoder, &mut buffer).expect("decoded"), [event], "{frame:?}");
        }
    }

    #[test]
    fn long_control_frames_and_other_versions_are_refused() {
        let mut buffer = BytesMut::from(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff][..]);
        assert!(matches!(Decoder::default().decode(&mut buffer), Err(SpdyError::TooLong(_))));
        let mut buffer = BytesMut::from(&[0x80, 2, 0, 6, 0, 0, 0, 0][..]);
        assert!(matches!(Decoder::default().decode(&mut buffer), Err(SpdyError::Version(2))));
    }

    #[test]
    fn settings_tell_the_window() {
        let body = [0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 1, 0];
        let mut buffer = BytesMut::from(&[&[0x80, 3, 0, 4, 0, 0, 0, 12][..], &body].concat()[..]);
        let event = Decoder::default().decode(&mut buffer).expect("decoded");
        assert_eq!(event, Some(Event::Settings { initial_window: Some(256) }));
    }

    /// Any frame, with the event it must be understood as.
    fn frame() -> impl Strategy<Value = (Frame, Event)> {
        let id = 1_u32..1 << 31;
        let headers = prop::collection::vec(("[a-z-]{1,12}", "[ -~]{0,40}"), 0..8);
        prop_oneof![
            (id.clone(), headers).prop_map(|(id, headers)| (
                Frame::SynStream { id, headers: headers.clone() },
                Event::SynStream { id, headers, fin: false }
            )),
            id.clone().prop_map(|id| (Frame::SynReply { id }, Event::Ignored)),
            (id.clone(), prop::collection::vec(any::<u8>(), 0..300), any::<bool>()).prop_map(
                |(id, bytes, fin)| {
                    let bytes = Bytes::from(bytes);
                    (Frame::Data { id, bytes: bytes.clone(), fin }, Event::Data { id, bytes, fin })
                }
            ),
            (id.clone(), any::<u32>())
                .prop_map(|(id, status)| (Frame::Reset { id, status }, Event::Reset { id })),
            any::<u32>().prop_map(|id| (Frame::Ping(id), Event::Ping(id))),
            any::<u32>().prop_map(|last| (Frame::GoAway { last }, Event::GoAway)),
            (id, 0_u32..1 << 31).prop_map(|(id, delta)| (
                Frame::WindowUpdate { id, delta },
                Event::WindowUpdate { id, delta }
            )),
        ]
    }

    /// Events with the pieces of data put together, wherever they were cut.
    fn merged(events: Vec<Event>) -> Vec<Event> {
        let mut all: Vec<Event> = Vec::new();
        for event in events {
            match (all.last_mut(), event) {
                (Some(Event::Data { id: last, bytes: have, fin: ended }), Event::Data { id, bytes, fin })
                    if *last == id && !*ended =>
                {
                    *have = [&have[..], &bytes[..]].concat().into();
                    *ended = fin;
                }
                (_, event) => all.push(event),
            }
        }
        all
    }

    proptest! {
        #[test]
        fn any_frames_are_understood_however_the_wire_is_cut(
            frames in prop::collection::vec(frame(), 0..12), cut in 1_usize..400,
        ) {
            let (mut encoder, mut wire) = (Encoder::default(), BytesMut::new());
            for (frame, _) in &frames {
                encoder.encode(frame, &mut wire).expect("encoded");
            }
            let (mut decoder, mut buffer, mut got) = (Decoder::default(), BytesMut::new(), Vec::new());
            for piece in wire.chunks(cut) {
                buffer.extend_from_slice(piece);
                got.extend(decode_all(&mut decoder, &mut buffer).expect("decoded"));
            }
            prop_assert_eq!(merged(got), merged(frames.into_iter().map(|(_, event)| event).collect()));
        }

        #[test]
        fn data_survives_any_split(data in prop::collection::vec(any::<u8>(), 0..100_000), cut in 1_usize..5000) {
            let mut wire = BytesMut::new();
            let frame = Frame::Data { id: 5, bytes: Bytes::from(data.clone()), fin: true };
            Encoder::default().encode(&frame, &mut wire).expect("encoded");
            let (mut decoder, mut buffer, mut got, mut fins) = (Decoder::default(), BytesMut::new(), Vec::new(), 0);
            for piece in wire.chunks(cut) {
                buffer.extend_from_slice(piece);
                for event in decode_all(&mut decoder, &mut buffer).expect("decoded") {
                    let Event::Data { id: 5, bytes, fin } = event else { panic!("only data") };
                    got.extend_from_slice(&bytes);
                    fins += u32::from(fin);
                }
            }
            prop_assert_eq!(got, data);
            prop_assert_eq!(fins, 1);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), control: bool) {
            let mut buffer = BytesMut::new();
            if control {
                // Get past the checks of version and length more often than chance would.
                let kind = bytes.first().copied().unwrap_or(0) % 12;
                let length = u16::try_from(bytes.len()).expect("short").to_be_bytes();
                buffer.extend_from_slice(&[0x80, 3, 0, kind, 0, 0, length[0], length[1]]);
            }
            buffer.extend_from_slice(&bytes);
            let mut decoder = Decoder::default();
            let mut most = 1000;
            while let Ok(Some(_)) = decoder.decode(&mut buffer) {
                most -= 1;
                prop_assert!(most > 0, "each event takes bytes");
            }
        }
    }
}

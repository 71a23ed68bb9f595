//! Entry points for the fuzz targets in `cri-shim/fuzz`: private parts with bytes of a stranger on the other end.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::runtime::{Streams, Wanted};
use crate::websocket::{self, Protocol};

/// Longest one input may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Serves an exec to a client that sends `bytes`: as they are, or `framed` as the payload of valid binary frames, the first
/// byte of each saying how long the next is. The process reads its input and ends with it.
pub fn websocket(protocol: u8, framed: bool, bytes: &[u8]) {
    let protocol = Protocol::ALL[usize::from(protocol) % Protocol::ALL.len()];
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else { return };
    let wire = if framed { frames(bytes) } else { bytes.to_vec() };
    runtime.block_on(async {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: false };
        let work = async |mut streams: Streams| {
            let (Some(mut stdin), Some(stdout)) = (streams.stdin.take(), streams.stdout.take()) else {
                return Ok(1);
            };
            while let Some(bytes) = stdin.recv().await {
                // Echoed, so that output meets a client that may have left.
                if stdout.send(bytes).await.is_err() {
                    break;
                }
            }
            Ok(0)
        };
        let serve = websocket::serve(server, protocol, wanted, "fuzzing", work);
        let talk = async {
            let (mut from, mut to) = tokio::io::split(client);
            let send = async {
                // The server may have had enough.
                drop(to.write_all(&wire).await);
                drop(to.shutdown().await);
            };
            let mut answers = Vec::new();
            let (_, read) = tokio::join!(send, from.read_to_end(&mut answers));
            drop(read);
        };
        let both = async { tokio::join!(serve, talk) };
        assert!(tokio::time::timeout(PATIENCE, both).await.is_ok(), "a client that left is still served");
    });
}

/// Cuts bytes into masked binary frames.
fn frames(mut bytes: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    while let Some((length, rest)) = bytes.split_first() {
        let length = usize::from(*length % 126).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        let mask = [7, 11, 13, 17];
        wire.extend_from_slice(&[0x82, 0x80 | u8::try_from(length).unwrap_or(0)]);
        wire.extend_from_slice(&mask);
        wire.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        bytes = rest;
    }
    wire
}

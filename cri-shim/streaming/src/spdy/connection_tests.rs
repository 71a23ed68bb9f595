//! A hand-written client against [`Connection`].

use tokio::io::DuplexStream;

use super::super::headers::header;
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// The client's end: writes frames, reads events.
struct Client {
    io: DuplexStream,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
}

impl Client {
    fn connect(max_streams: usize) -> (Self, Connection, mpsc::Receiver<Stream>) {
        let (io, server) = tokio::io::duplex(2 * MAX_DATA);
        let (connection, streams) = Connection::serve(server, max_streams);
        let client =
            Self { io, encoder: Encoder::default(), decoder: Decoder::default(), buffer: BytesMut::new() };
        (client, connection, streams)
    }

    async fn send(&mut self, frame: Frame) {
        let mut bytes = BytesMut::new();
        self.encoder.encode(&frame, &mut bytes).expect("encoded");
        tokio::time::timeout(PATIENCE, self.io.write_all(&bytes)).await.expect("in time").expect("written");
    }

    async fn open(&mut self, id: u32, kind: &str) {
        self.send(Frame::SynStream { id, headers: vec![("streamtype".to_owned(), kind.to_owned())] }).await;
    }

    /// The next event, or `None` at the end of the connection.
    async fn event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.decoder.decode(&mut self.buffer).expect("well formed") {
                return Some(event);
            }
            let read = tokio::time::timeout(PATIENCE, self.io.read_buf(&mut self.buffer)).await;
            if read.expect("in time").expect("read") == 0 {
                return None;
            }
        }
    }
}

async fn next<T>(receiver: &mut mpsc::Receiver<T>) -> Option<T> {
    tokio::time::timeout(PATIENCE, receiver.recv()).await.expect("in time")
}

#[tokio::test]
async fn data_flows_both_ways_and_ends_are_told() {
    let (mut client, connection, mut streams) = Client::connect(8);
    client.open(1, "stdin").await;
    client.send(Frame::Data { id: 1, bytes: Bytes::from_static(b"in"), fin: true }).await;
    let mut stream = next(&mut streams).await.expect("a stream");
    assert_eq!(header(&stream.headers, "streamtype"), Some("stdin"));
    assert_eq!(next(&mut stream.input).await.as_deref(), Some(&b"in"[..]));
    assert_eq!(next(&mut stream.input).await, None, "half-closed");
    stream.output.send(Bytes::from_static(b"out")).await.expect("open");
    stream.output.finish().await;
    assert_eq!(client.event().await, Some(Event::Ignored), "SYN_REPLY");
    assert_eq!(
        client.event().await,
        Some(Event::Data { id: 1, bytes: Bytes::from_static(b"out"), fin: false })
    );
    assert_eq!(client.event().await, Some(Event::Data { id: 1, bytes: Bytes::new(), fin: true }));
    let closing = tokio::spawn(connection.close());
    assert_eq!(client.event().await, Some(Event::GoAway));
    assert_eq!(client.event().await, None);
    drop(client);
    tokio::time::timeout(PATIENCE, closing).await.expect("in time").expect("closed");
}

#[tokio::test]
async fn a_vanished_client_ends_every_stream() {
    let (mut client, connection, mut streams) = Client::connect(8);
    client.open(1, "stdin").await;
    let mut stream = next(&mut streams).await.expect("a stream");
    drop(client);
    tokio::time::timeout(PATIENCE, connection.gone().cancelled()).await.expect("noticed");
    assert_eq!(next(&mut stream.input).await, None);
    let sending = async { while stream.output.send(Bytes::from_static(b"x")).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, sending).await.expect("sending fails");
}

#[tokio::test]
async fn streams_beyond_the_bound_are_refused_until_others_end() {
    let (mut client, _connection, mut streams) = Client::connect(1);
    client.open(1, "data").await;
    client.open(3, "data").await;
    assert_eq!(client.event().await, Some(Event::Ignored));
    assert_eq!(client.event().await, Some(Event::Reset { id: 3 }));
    let stream = next(&mut streams).await.expect("a stream");
    client.send(Frame::Reset { id: 1, status: 5 }).await;
    tokio::time::timeout(PATIENCE, stream.output.cut()).await.expect("cut");
    client.open(5, "data").await;
    assert_eq!(client.event().await, Some(Event::Ignored));
    assert!(next(&mut streams).await.is_some());
}

#[tokio::test]
async fn an_unread_stream_holds_the_client_back_and_windows_are_given_back() {
    let (mut client, _connection, mut streams) = Client::connect(8);
    client.open(1, "data").await;
    let mut stream = next(&mut streams).await.expect("a stream");
    assert_eq!(client.event().await, Some(Event::Ignored));
    let data = Bytes::from(vec![7; MAX_DATA]);
    let (mut io, mut encoder) = (client.io, client.encoder);
    let bound = MAX_DATA * (INPUT_QUEUE + 4);
    let mut sent = 0;
    loop {
        let mut bytes = BytesMut::new();
        encoder.encode(&Frame::Data { id: 1, bytes: data.clone(), fin: false }, &mut bytes).expect("encoded");
        let written = tokio::time::timeout(Duration::from_millis(100), io.write_all_buf(&mut bytes)).await;
        if written.is_err() {
            break;
        }
        sent += data.len();
        assert!(sent <= bound, "nothing holds the client back");
    }
    let mut got = 0;
    while got < sent {
        got += next(&mut stream.input).await.expect("data").len();
    }
    let mut head = [0; 4];
    tokio::time::timeout(PATIENCE, io.read_exact(&mut head)).await.expect("in time").expect("a frame");
    assert_eq!(head, [0x80, 3, 0, 9], "WINDOW_UPDATE");
}

#[tokio::test]
async fn a_peer_with_settings_is_sent_no_more_than_its_window() {
    let (mut client, _connection, mut streams) = Client::connect(8);
    let settings = [0x80, 3, 0, 4, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 10];
    client.io.write_all(&settings).await.expect("written");
    client.open(1, "data").await;
    let stream = next(&mut streams).await.expect("a stream");
    assert_eq!(client.event().await, Some(Event::Ignored));
    let sending =
        tokio::spawn(async move { stream.output.send(Bytes::from_static(b"0123456789abcdef")).await });
    assert_eq!(
        client.event().await,
        Some(Event::Data { id: 1, bytes: Bytes::from_static(b"0123456789"), fin: false })
    );
    client.send(Frame::WindowUpdate { id: 1, delta: 100 }).await;
    assert_eq!(
        client.event().await,
        Some(Event::Data { id: 1, bytes: Bytes::from_static(b"abcdef"), fin: false })
    );
    sending.await.expect("joined").expect("sent");
}

#[tokio::test]
async fn pings_are_answered_and_madness_ends_the_connection() {
    let (mut client, connection, _streams) = Client::connect(8);
    client.send(Frame::Ping(9)).await;
    assert_eq!(client.event().await, Some(Event::Ping(9)));
    client.send(Frame::Data { id: 99, bytes: Bytes::from_static(b"x"), fin: false }).await;
    tokio::time::timeout(PATIENCE, connection.gone().cancelled()).await.expect("cut");
}

//! Connections: whose they are, and how they end.

use std::sync::atomic::{AtomicUsize, Ordering};

use outhaul_testkit::{PATIENCE, number};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::super::Token;
use super::*;

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

async fn taken(accepted: TcpStream, access: &ListenerRules) -> Option<Connection> {
    let room = Room::new(1, None);
    let place = std::future::poll_fn(|cx| room.poll_enter(cx)).await.unwrap();
    take(accepted, access.clone(), Protocol::Http2, Peers::default(), place).await
}

/// A listener with places, and where it is.
async fn open(protocol: Protocol, places: usize) -> (Incoming, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = Incoming::new(
        Listening::Tcp(listener),
        ListenerRules::default(),
        protocol,
        places,
    );
    (incoming, address)
}

async fn next(incoming: &mut Incoming) -> Connection {
    let next = timeout(PATIENCE, incoming.next()).await.expect("a connection");
    next.unwrap().unwrap()
}

/// That it was closed from the other end.
async fn is_closed(client: &mut TcpStream) -> bool {
    matches!(
        timeout(PATIENCE, client.read(&mut [0])).await.unwrap(),
        Ok(0) | Err(_)
    )
}

#[tokio::test]
async fn whose_a_connection_is_is_known_whatever_its_listener_asks_for() {
    let uid = rustix::process::geteuid().as_raw();
    for token in [None, Some(Token::new("0123456789abcdef").unwrap())] {
        let access = ListenerRules::new(Rules {
            token,
            ..Rules::default()
        });
        let (_client, accepted) = pair().await;
        let connection = taken(accepted, &access).await.unwrap();
        assert_eq!(connection.origin.caller, Caller::Process { uid, unix: false });
    }
}

#[tokio::test]
async fn what_a_client_that_has_gone_left_behind_is_not_taken() {
    for resets in [false, true] {
        let (mut client, accepted) = pair().await;
        client.write_all(b"PRI * HTTP/2.0").await.unwrap();
        if resets {
            client.set_zero_linger().unwrap();
        }
        drop(client);
        assert!(
            taken(accepted, &ListenerRules::default()).await.is_none(),
            "{resets}"
        );
    }
}

#[tokio::test]
async fn the_last_place_is_for_who_comes_and_is_taken_from_the_oldest_without_a_call() {
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let (mut incoming, address) = open(protocol, 2).await;
        let mut clients = Vec::new();
        let mut connections = Vec::new();
        for _ in 0..2 {
            clients.push(TcpStream::connect(address).await.unwrap());
            connections.push(next(&mut incoming).await);
        }
        let call = connections[0].origin.visit.admitted();
        clients.push(TcpStream::connect(address).await.unwrap());
        // As who serves it does: reads until its end, and drops it then.
        let mut oldest = connections.pop().unwrap();
        let (third, read) = tokio::join!(next(&mut incoming), async {
            let read = oldest.read(&mut [0]).await;
            drop(oldest);
            read
        });
        assert_eq!(read.unwrap(), 0);
        assert!(is_closed(&mut clients[1]).await);
        let _second = third.origin.visit.admitted();
        // All are at work now: better no than no answer.
        let mut refused = TcpStream::connect(address).await.unwrap();
        let (closed, ()) = tokio::join!(is_closed(&mut refused), async {
            let more = timeout(Duration::from_millis(200), incoming.next()).await;
            assert!(more.is_err());
        });
        assert!(closed);
        drop(call);
        drop(connections);
        let _client = TcpStream::connect(address).await.unwrap();
        next(&mut incoming).await;
    }
}

#[tokio::test]
async fn who_does_not_take_its_answer_has_to_leave_all_the_same() {
    let (mut incoming, address) = open(Protocol::Http1, 1).await;
    let _client = TcpStream::connect(address).await.unwrap();
    let mut connection = next(&mut incoming).await;
    let _other = TcpStream::connect(address).await.unwrap();
    let (_, error) = tokio::join!(next(&mut incoming), async {
        loop {
            if let Err(error) = connection.write_all(&[0; 1 << 16]).await {
                drop(connection);
                return error;
            }
        }
    });
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn handshakes_that_get_nowhere_keep_nobody_out() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (certificate, key) = (
        file("c", made.cert.pem()),
        file("k", made.signing_key.serialize_pem()),
    );
    let (mut incoming, address) = open(Protocol::Http2, 3).await;
    incoming.access.set(Rules {
        tls: Some(super::super::ServerTls::read(&certificate, &key, None).unwrap()),
        ..Rules::default()
    });
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let began = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let client = async {
        let stream = TcpStream::connect(address).await.unwrap();
        connector.connect("localhost".try_into().unwrap(), stream).await
    };
    let (_, agreed) = tokio::join!(next(&mut incoming), client);
    agreed.unwrap();
    assert!(began.elapsed() < HANDSHAKE, "nobody waits for the silent ones");
}

#[tokio::test]
async fn silence_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut incoming = Incoming::new(
        Listening::Tcp(listener),
        ListenerRules::default(),
        Protocol::Http2,
        2,
    );
    incoming.room = Room::new(2, Some(Duration::from_millis(10)));
    let mut client = TcpStream::connect(address).await.unwrap();
    let mut connection = next(&mut incoming).await;
    let more = async { while timeout(PATIENCE, incoming.next()).await.is_ok() {} };
    let mut byte = [0];
    let read = tokio::select! {
        read = connection.read(&mut byte) => read,
        () = more => panic!("it was not let go"),
    };
    assert_eq!(read.unwrap(), 0);
    drop(connection);
    assert!(is_closed(&mut client).await);
}

/// A served connection: with a call of a random kind at times, read to its end, then dropped.
async fn serve(mut connection: Connection, mut random: StdRng, open: Arc<AtomicUsize>) {
    let leave = connection._place.leave();
    let mut call = match random.random_range(0..4) {
        0 => Some(connection.origin.visit.admitted()),
        1 => {
            connection.origin.visit.heard();
            None
        }
        _ => None,
    };
    let asked_before = leave.is_cancelled();
    let (mut bytes, mut read) = ([0; 16], 0);
    let until = tokio::time::sleep(Duration::from_millis(random.random_range(0..40)));
    tokio::pin!(until);
    loop {
        tokio::select! {
            next = connection.read(&mut bytes) => match next {
                Ok(0) | Err(_) => break,
                Ok(more) => read += more,
            },
            () = &mut until, if call.is_some() => {
                assert!(asked_before || !leave.is_cancelled(), "nobody with a call under way is asked to leave");
                call = None;
            }
        }
    }
    if read > 64 && random.random() {
        let _ = connection.write_all(&[0; 1 << 20]).await;
    }
    open.fetch_sub(1, Ordering::Relaxed);
}

/// `OUTHAUL_HOSTILE_CASES` is how many crowds there are, `OUTHAUL_HOSTILE_SEED` repeats one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crowds_of_all_kinds_stay_within_the_places_and_keep_nobody_out() {
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(12);
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for seed in first..first.saturating_add(cases) {
        eprintln!("OUTHAUL_HOSTILE_SEED={seed} OUTHAUL_HOSTILE_CASES=1");
        let random = &mut StdRng::seed_from_u64(seed);
        let places = random.random_range(1..12);
        let protocol = [Protocol::Http1, Protocol::Http2][random.random_range(0..2)];
        let (mut incoming, address) = open(protocol, places).await;
        let room = incoming.room.clone();
        let (open, mut seeds) = (Arc::<AtomicUsize>::default(), StdRng::seed_from_u64(seed));
        let accepting = tokio::spawn(async move {
            let mut serving = tokio::task::JoinSet::new();
            loop {
                let connection = tokio::select! {
                    next = incoming.next() => next.unwrap().unwrap(),
                    Some(served) = serving.join_next() => {
                        served.unwrap();
                        continue;
                    }
                };
                let now = open.fetch_add(1, Ordering::Relaxed);
                assert!(now < places, "{now} are open already");
                let random = StdRng::seed_from_u64(seeds.random());
                serving.spawn(serve(connection, random, open.clone()));
            }
        });
        let mut held = Vec::new();
        for _ in 0..random.random_range(1..60) {
            let connecting = timeout(PATIENCE, TcpStream::connect(address)).await;
            let mut client = connecting.expect("a place in the queue").unwrap();
            let _ = client.write_all(&vec![b'x'; random.random_range(0..100)]).await;
            match random.random_range(0..5) {
                0 => {}
                1 => client.set_zero_linger().unwrap(),
                2 => {
                    let _ = client.shutdown().await;
                    held.push(client);
                }
                _ => held.push(client),
            }
        }
        // As soon as calls have ended, all places are free for new connections.
        let began = Instant::now();
        let mut last = loop {
            assert!(began.elapsed() < PATIENCE, "OUTHAUL_HOSTILE_SEED={seed}");
            let mut client = timeout(PATIENCE, TcpStream::connect(address))
                .await
                .unwrap()
                .unwrap();
            let refused = timeout(Duration::from_millis(100), client.read(&mut [0])).await;
            if refused.is_err() {
                break client;
            }
        };
        assert!(!accepting.is_finished(), "OUTHAUL_HOSTILE_SEED={seed}");
        let _ = last.write_all(b"x").await;
        drop(held);
        drop(last);
        let all_free = async {
            while !room.is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let all_free = timeout(PATIENCE, all_free).await;
        assert!(all_free.is_ok(), "OUTHAUL_HOSTILE_SEED={seed}");
        accepting.abort();
        let ended = accepting.await.unwrap_err();
        assert!(ended.is_cancelled(), "{ended}, OUTHAUL_HOSTILE_SEED={seed}");
    }
}

#[tokio::test]
async fn a_client_of_the_admin_port_that_takes_nothing_of_an_answer_is_let_go() {
    for (protocol, ends) in [(Protocol::Http1, true), (Protocol::Http2, false)] {
        let (mut incoming, address) = open(protocol, 1).await;
        let _client = TcpStream::connect(address).await.unwrap();
        let mut connection = next(&mut incoming).await;
        tokio::time::pause();
        let piece = [0; 65_536];
        let failed = timeout(2 * STALL, async {
            loop {
                if let Err(error) = connection.write_all(&piece).await {
                    return error.kind();
                }
            }
        });
        let failed = failed.await.ok();
        assert_eq!(failed, ends.then_some(io::ErrorKind::TimedOut), "{protocol:?}");
        tokio::time::resume();
    }
}

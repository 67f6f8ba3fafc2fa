//! A server that sends whatever a test wants, byte by byte.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};

/// A request's head.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    /// By names in lower case; several values in their order.
    pub(super) headers: HashMap<String, Vec<String>>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|all| all.last())
            .map_or("", String::as_str)
    }

    /// The first byte that `Range` asks for.
    pub(super) fn from(&self) -> Option<usize> {
        self.header("range")
            .strip_prefix("bytes=")?
            .split('-')
            .next()?
            .parse()
            .ok()
    }
}

/// What becomes of the connection after an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Keep,
    Close,
    /// Nothing more is sent, and it is not closed.
    Hang,
}

/// An answer, as it goes over the line.
#[derive(Debug, Clone)]
pub(super) struct Reply(pub(super) Vec<u8>, pub(super) Then);

/// An answer with a status, headers and a body, and the length of the body unless the headers have one.
pub(super) fn reply(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut head = format!("HTTP/1.1 {status} Words\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let is_reported = |(name, _): &(&str, &str)| matches!(*name, "content-length" | "transfer-encoding");
    if !headers.iter().any(is_reported) && status != 204 {
        head.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    Reply([head.as_bytes(), b"\r\n", body].concat(), Then::Keep)
}

/// A body in chunks.
pub(super) fn chunked(body: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for chunk in body.chunks(5000) {
        all.extend(format!("{:x}\r\n", chunk.len()).bytes());
        all.extend_from_slice(chunk);
        all.extend(b"\r\n");
    }
    all.extend(b"0\r\n\r\n");
    all
}

impl Reply {
    /// The first bytes, this many, and then something else.
    pub(super) fn cut(mut self, less: usize, then: Then) -> Self {
        self.0.truncate(self.0.len() - less);
        Self(self.0, then)
    }

    pub(super) fn then(self, then: Then) -> Self {
        Self(self.0, then)
    }
}

/// Makes an answer of a request and the number of those before it.
pub(super) type Script = Arc<dyn Fn(&Request, usize) -> Reply + Send + Sync>;

/// A running server.
#[derive(Clone)]
pub(super) struct Fake {
    script: Script,
    log: Arc<Mutex<Vec<Request>>>,
    connections: Arc<AtomicUsize>,
}

impl Fake {
    pub(super) fn new(script: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self {
            script: Arc::new(script),
            log: Arc::default(),
            connections: Arc::default(),
        }
    }

    /// Starts it; its address, as `HOST:PORT`.
    pub(super) async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let fake = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                fake.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(fake.clone().serve(stream));
            }
        });
        address
    }

    /// What was asked, in order.
    pub(super) fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub(super) async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let mut stream = BufReader::new(stream);
        while let Some(request) = read_head(&mut stream).await {
            let number = {
                let mut log = self.log.lock().unwrap();
                log.push(request.clone());
                log.len() - 1
            };
            let Reply(bytes, then) = (self.script)(&request, number);
            if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() {
                return;
            }
            match then {
                Then::Keep => {}
                Then::Close => return drop(stream.shutdown().await),
                Then::Hang => std::future::pending().await,
            }
        }
    }
}

async fn read_head(stream: &mut BufReader<impl AsyncRead + Unpin>) -> Option<Request> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let mut words = lines.first()?.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers: HashMap<String, Vec<String>> = HashMap::new();
    for (name, value) in lines[1..].iter().filter_map(|line| line.split_once(':')) {
        headers
            .entry(name.to_ascii_lowercase())
            .or_default()
            .push(value.trim().to_owned());
    }
    Some(Request {
        method,
        path,
        headers,
    })
}

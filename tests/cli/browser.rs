//! A real browser, by the WebDriver protocol (W3C): Debian's Chromium and its driver.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    time::Duration,
};

use base64::Engine as _;
use outhaul_testkit::{Running, in_time, peers, until};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

/// What it takes.
pub const PEERS: [&str; 2] = ["chromium", "chromedriver"];

pub const TAB: char = '\u{e004}';
pub const ENTER: char = '\u{e007}';

/// A browser with one window. It ends with this.
pub struct Browser {
    address: SocketAddr,
    session: String,
    _driver: Running,
    _profile: tempfile::TempDir,
}

/// One request, and what is in its answer's `value`.
async fn ask(address: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Value> {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut connection = BufReader::new(connection);
    let (mut head, mut length) = (String::new(), 0);
    // The driver does not close the connection.
    loop {
        let mut line = String::new();
        in_time(connection.read_line(&mut line)).await.unwrap();
        let line = line.to_ascii_lowercase();
        if let Some(bytes) = line.strip_prefix("content-length:") {
            length = bytes.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    in_time(connection.read_exact(&mut body)).await.unwrap();
    let mut value: Value = serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{e}: {head}"));
    let value = value["value"].take();
    if head.starts_with("http/1.1 200") {
        Ok(value)
    } else {
        Err(value)
    }
}

impl Browser {
    /// A new one, with a window of this size.
    pub async fn open(width: u32, height: u32, dark: bool) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let (driver, address) = Running::listening("chromedriver", |address| {
            let mut command = Command::new(peers::program("chromedriver"));
            command
                .arg(format!("--port={}", address.port()))
                // The browser ends with it.
                .env("HOME", profile.path())
                .env("TMPDIR", profile.path());
            command
        });
        let mut args = vec![
            "--headless=new".to_owned(),
            // It is root in a container, mostly.
            "--no-sandbox".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-gpu".to_owned(),
            "--hide-scrollbars".to_owned(),
            "--lang=en-GB".to_owned(),
            format!("--window-size={width},{height}"),
        ];
        args.extend(dark.then(|| "--blink-settings=preferredColorScheme=0".to_owned()));
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": peers::program("chromium"), "args": args },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        }}});
        let opened = ask(address, "POST", "/session", Some(&capabilities)).await;
        let opened = opened.unwrap_or_else(|error| panic!("{error:#}"));
        let browser = Self {
            address,
            session: opened["sessionId"].as_str().unwrap().to_owned(),
            _driver: driver,
            _profile: profile,
        };
        // A window of the screen has a frame, which is no part of the page; a phone has none.
        let page = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        browser.devtools("Emulation.setDeviceMetricsOverride", page).await;
        browser
    }

    async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, Value> {
        let path = format!("/session/{}/{path}", self.session);
        ask(self.address, method, &path, body.as_ref()).await
    }

    async fn devtools(&self, method: &str, params: Value) {
        let body = json!({ "cmd": method, "params": params });
        self.call("POST", "goog/cdp/execute", Some(body)).await.unwrap();
    }

    /// Goes to an address, and waits until it is loaded.
    pub async fn go(&self, address: &str) {
        let body = json!({ "url": address });
        self.call("POST", "url", Some(body)).await.unwrap();
    }

    /// What a script gives, which is the body of a function.
    pub async fn run(&self, script: &str) -> Value {
        let body = json!({ "script": script, "args": [] });
        let given = self.call("POST", "execute/sync", Some(body)).await;
        given.unwrap_or_else(|error| panic!("{script}: {error:#}"))
    }

    /// The text of the page that is seen.
    pub async fn text(&self) -> String {
        let text = self.run("return document.body.innerText").await;
        text.as_str().unwrap().to_owned()
    }

    /// Waits until the page shows a text.
    pub async fn shows(&self, text: &str) {
        let mut seen = String::new();
        let what = format!("the page shows {text:?}");
        let waited = until(&what, async || {
            seen = self.text().await;
            seen.contains(text)
        });
        waited.await;
    }

    /// Whether there is such an element, by its CSS selector.
    pub async fn has(&self, selector: &str) -> bool {
        let script = format!("return document.querySelector({}) !== null", json!(selector));
        self.run(&script).await == json!(true)
    }

    /// Presses keys, one after the other.
    pub async fn press(&self, keys: &str) {
        let actions: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key.to_string() }))
            })
            .collect();
        let body = json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] });
        self.call("POST", "actions", Some(body)).await.unwrap();
    }

    /// Presses the tabulator until this has the focus.
    pub async fn tab_to(&self, selector: &str) {
        let script = format!(
            "return document.activeElement !== null && document.activeElement.matches({})",
            json!(selector)
        );
        for _ in 0..200 {
            if self.run(&script).await == json!(true) {
                return;
            }
            self.press(&TAB.to_string()).await;
        }
        panic!("the tabulator does not lead to {selector}");
    }

    /// What is in the log of this kind since it was asked for last.
    async fn log(&self, kind: &str) -> Vec<Value> {
        let body = json!({ "type": kind });
        let log = self.call("POST", "se/log", Some(body)).await.unwrap();
        log.as_array().unwrap().clone()
    }

    /// Demands that the page had nothing to complain of, and that everything so far was asked of this address alone.
    #[track_caller]
    pub fn assert_quiet(&self, address: &str) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let console = self.log("browser").await;
            assert!(console.is_empty(), "{caller}: {console:#?}");
            let mut asked = 0;
            for entry in self.log("performance").await {
                let message: Value = serde_json::from_str(entry["message"].as_str().unwrap()).unwrap();
                let message = &message["message"];
                let url = match message["method"].as_str().unwrap_or_default() {
                    "Network.requestWillBeSent" => &message["params"]["request"]["url"],
                    "Network.webSocketCreated" => &message["params"]["url"],
                    _ => continue,
                };
                let url = url.as_str().unwrap_or_default();
                let is_ours =
                    url.starts_with(address) || url.starts_with("data:") || url.starts_with("chrome");
                assert!(is_ours, "{caller}: {url}");
                asked += usize::from(url.starts_with(address));
            }
            assert!(asked > 0, "{caller}: the log has no requests");
        }
    }

    /// Whether pictures are kept.
    pub fn takes_pictures() -> bool {
        std::env::var_os("OUTHAUL_PICTURES").is_some()
    }

    /// Keeps a picture of the window, if `OUTHAUL_PICTURES` names a directory.
    pub async fn picture(&self, name: &str) {
        let Some(directory) = std::env::var_os("OUTHAUL_PICTURES") else {
            return;
        };
        tokio::time::sleep(Duration::from_millis(300)).await;
        let picture = self.call("GET", "screenshot", None).await.unwrap();
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(picture.as_str().unwrap())
            .unwrap();
        std::fs::write(PathBuf::from(directory).join(format!("{name}.png")), bytes).unwrap();
    }
}

impl Drop for Browser {
    /// Ends the browser, which would outlive its driver.
    fn drop(&mut self) {
        let Ok(mut connection) = std::net::TcpStream::connect(self.address) else {
            return;
        };
        let request = format!(
            "DELETE /session/{} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.session, self.address
        );
        let _ = connection.set_read_timeout(Some(Duration::from_secs(10)));
        let _ = connection.write_all(request.as_bytes());
        let _ = connection.read(&mut [0; 1024]);
    }
}

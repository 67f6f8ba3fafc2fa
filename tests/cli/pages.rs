//! The status page: whom it is for, and what a real browser makes of it.

use std::{os::unix::process::CommandExt as _, process::Command, time::Instant};

use outhaul::{
    demo::{Setting, Shape, play},
    proto::google::devtools::build::v1::publish_build_event_client::PublishBuildEventClient,
};
use outhaul_testkit::{Running, clean, finish, in_time, number, peers, until};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    admin::get_from,
    browser::{Browser, ENTER, PEERS},
    support::{World, outhaul, requests},
};

/// Where a daemon has its status page, without a slash at the end.
async fn page_of(server: &Running) -> String {
    let log = server.logged("health and metrics on http://").await;
    let address = log.split("health and metrics on http://").nth(1).unwrap();
    address.lines().next().unwrap().trim().to_owned()
}

async fn serve(world: &World) -> (Running, String) {
    let server = world.serve(&["--admin-listen=127.0.0.1:0"]).await;
    let page = page_of(&server).await;
    (server, page)
}

/// Head and body of an answer to a request with these lines.
async fn ask(address: &str, request: &str, body: &str) -> (String, String) {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let text = format!("{request}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
    connection.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    in_time(connection.read_to_string(&mut answer)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

async fn settled(page: &str, id: &str) -> String {
    let path = format!("/build/{id}");
    let mut body = String::new();
    until("the build is settled", async || {
        body = get_from(page, page, &path, "").await.1;
        // The build itself, and not one of its targets.
        ["settled", "failed"]
            .iter()
            .any(|state| body.contains(&format!("<h1><span class=\"state {state}\"")))
    })
    .await;
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_builds_and_what_became_of_their_outputs() {
    let world = World::new().await;
    let (server, page) = serve(&world).await;
    let (head, body) = get_from(&page, &page, "/", "").await;
    assert!(
        head.starts_with("HTTP/1.1 200") && body.contains("No builds are recorded yet"),
        "{head}\n{body}"
    );
    assert!(
        head.contains("content-security-policy: default-src 'none'"),
        "{head}"
    );
    let lost = world.file("part1.h").1.clone();
    let bytes = world.cache.store().get(&lost).unwrap();
    assert!(world.cache.store().remove(&lost));
    world.play(&world.build, server.address()).await;
    let id = world.build.invocation_id();
    let body = settled(&page, &id).await;
    for part in [
        "//broken:broken",
        "lib/include/",
        "part1.h",
        "bazel build //lib:lib",
        "of 7",
        "exit code 1",
    ] {
        assert!(body.contains(part), "{part} is missing in\n{body}");
    }
    let (_, list) = get_from(&page, &page, "/", "").await;
    assert!(
        list.contains(&format!("{}/</span>workspace", world.dir.path().display())),
        "{list}"
    );
    let digest = lost.hash_hex();
    let found = |what: &str| format!("/outputs?q={what}");
    for (query, is_there) in [
        (found("PART1"), false),
        (found("part1.h"), true),
        (found("lib%20part1"), true),
        (found(&digest[..8]), true),
        (format!("/outputs?build={id}&q=part1&kind=evicted"), true),
        (format!("/outputs?build={id}&q=part1&kind=disk"), false),
    ] {
        let (_, body) = get_from(&page, &page, &query, "").await;
        assert_eq!(body.contains("part1.h</span>"), is_there, "{query}\n{body}");
    }
    let output = world.exec_root().join(&world.file("part1.h").0.path);
    let path = output.display().to_string();
    let (_, body) = get_from(&page, &page, &format!("/output?path={path}"), "").await;
    assert!(
        body.contains("named by: named_set 0") && body.contains("evicted"),
        "{body}"
    );
    let (_, body) = get_from(&page, &page, &format!("/build/{id}/timeline"), "").await;
    assert!(
        body.contains("app/app: 4.8 MiB") && body.contains("On average"),
        "{body}"
    );
    let (_, body) = get_from(&page, &page, "/disk/usage?by=target", "").await;
    assert!(body.contains("//app:app"), "{body}");
    let (_, body) = get_from(&page, &page, "/caches", "").await;
    assert!(
        body.contains(&world.cache.endpoint()) && body.contains("state asked"),
        "{body}"
    );
    for missing in ["/build/nothing", "/output?path=/nowhere", "/nowhere"] {
        assert!(
            get_from(&page, &page, missing, "")
                .await
                .0
                .starts_with("HTTP/1.1 404"),
            "{missing}"
        );
    }

    // It is back, and is asked for.
    world.cache.store().put(bytes);
    let right = format!(
        "POST /get HTTP/1.1\r\nHost: {page}\r\nOrigin: http://{page}\r\nX-Outhaul-Page: 1\r\nContent-Type: application/json"
    );
    let body = format!("{{\"paths\": [\"{path}\"]}}");
    for (request, code) in [
        (right.replace("X-Outhaul-Page: 1\r\n", ""), 403),
        (
            right.replace(&format!("Origin: http://{page}"), "Origin: http://evil.example"),
            403,
        ),
        (right.replace("application/json", "text/plain"), 403),
        (right.replace(&format!("Host: {page}"), "Host: evil.example"), 421),
        (right.replace("POST", "GET"), 405),
    ] {
        let (head, _) = ask(&page, &request, &body).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {code}")), "{request}: {head}");
        assert!(!output.exists(), "{request}");
    }
    let (head, came) = ask(&page, &right, &body).await;
    assert!(
        head.starts_with("HTTP/1.1 200") && came.contains("\"came\":1"),
        "{head}\n{came}"
    );
    assert!(output.exists());
}

/// A page's stream of events.
struct Live {
    connection: TcpStream,
    said: String,
}

impl Live {
    /// Asks for it. `None`, and nothing more, if there is no place for it.
    async fn open(page: &str, path: &str) -> Option<Self> {
        let mut connection = TcpStream::connect(page).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {page}\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut live = Self {
            connection,
            said: String::new(),
        };
        let head = live.up_to("\r\n\r\n").await;
        if head.starts_with("HTTP/1.1 503") {
            return None;
        }
        assert!(
            head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"),
            "{head}"
        );
        Some(live)
    }

    /// What it says up to some text and with that.
    async fn up_to(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.said.find(end) {
                let rest = self.said.split_off(at + end.len());
                return std::mem::replace(&mut self.said, rest);
            }
            let mut bytes = vec![0; 65_536];
            let read = in_time(self.connection.read(&mut bytes)).await.unwrap();
            assert!(read > 0, "it ends after {:?}", self.said);
            // What is looked for is in one chunk, and ASCII.
            self.said.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }

    /// The next event's name, and the parts that it brings.
    async fn next(&mut self) -> (String, serde_json::Value) {
        self.up_to("event: ").await;
        let name = self.up_to("\n").await.trim().to_owned();
        let data = self.up_to("\n\n").await;
        let data = data.trim().strip_prefix("data: ").unwrap();
        (name, serde_json::from_str(data).unwrap())
    }

    /// The event with this name that brings a part with such a text.
    async fn brings(&mut self, name: &str, part: &str, text: &str) -> serde_json::Value {
        loop {
            let (said, parts) = self.next().await;
            if said == name && parts[part].as_str().is_some_and(|part| part.contains(text)) {
                return parts;
            }
            assert_eq!(said, "parts", "{parts}");
        }
    }
}

/// Without a browser, which the other tests of this may lack.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_is_sent_to_those_who_look_until_it_is_over() {
    let world = World::new().await;
    let (server, page) = serve(&world).await;
    let mut list = Live::open(&page, "/live").await.unwrap();
    list.brings("parts", "builds", "No builds are recorded yet").await;
    // A build of which nothing is known but that it runs.
    let id = world.build.invocation_id();
    let (build_id, events) = (world.build.build_id(), world.build.events());
    let mut all = requests(&build_id, &id, events, true);
    let (send, rest) = tokio::sync::mpsc::channel(1000);
    let mut client = PublishBuildEventClient::connect(server.address().replace("grpc://", "http://"))
        .await
        .unwrap();
    let later = all.split_off(1);
    for request in all {
        send.send(request).await.unwrap();
    }
    let answers = client.publish_build_tool_event_stream(ReceiverStream::new(rest));
    let mut answers = in_time(answers).await.unwrap().into_inner();
    list.brings("parts", "builds", "state running").await;
    let path = format!("/build/{id}");
    let (head, body) = get_from(&page, &page, &path, "").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    for part in [
        "id=\"timeline\"",
        "id=\"outputs\"",
        "has not named this build's output root yet",
    ] {
        assert!(body.contains(part), "{part} is missing in\n{body}");
    }
    let mut build = Live::open(&page, &format!("{path}/live")).await.unwrap();
    build.brings("parts", "summary", "state running").await;
    for request in later {
        send.send(request).await.unwrap();
    }
    drop(send);
    while in_time(answers.message()).await.unwrap().is_some() {}
    let over = build.brings("over", "outputs", "lib/include/").await;
    assert!(over["timeline"].as_str().unwrap().contains("<svg"), "{over}");
    build.up_to("\r\n0\r\n\r\n").await;
    list.brings("parts", "builds", "state settled").await;
    // Nobody takes all connections with pages that are open.
    let mut open = vec![list];
    while let Some(live) = Live::open(&page, "/live").await {
        open.push(live);
    }
    assert_eq!(open.len(), 24);
    drop(open);
    until("there is a place again", async || {
        Live::open(&page, "/live").await.is_some()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_a_password_and_other_pages_do_not_make_a_browser_ask_for_it() {
    let world = World::new().await;
    let token = world.path("token");
    std::fs::write(&token, "0123456789abcdef").unwrap();
    let flag = format!("--admin-token-file={token}");
    let server = world.serve(&["--admin-listen=127.0.0.1:0", &flag]).await;
    let page = page_of(&server).await;
    let ask = async |headers: &str| get_from(&page, &page, "/", headers).await.0.to_lowercase();
    let head = ask("").await;
    assert!(
        head.starts_with("http/1.1 401") && head.contains("www-authenticate: basic "),
        "{head}"
    );
    // anyone:0123456789abcdef
    let head = ask("Authorization: Basic YW55b25lOjAxMjM0NTY3ODlhYmNkZWY=\r\n").await;
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let head = ask("Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n").await;
    assert!(
        head.starts_with("http/1.1 403") && !head.contains("www-authenticate"),
        "{head}"
    );
    // A browser's head is long where there are many servers on one machine.
    let cookies = format!("Cookie: {}\r\n", "a".repeat(20_000));
    assert!(ask(&cookies).await.starts_with("http/1.1 401"));
}

#[tokio::test(flavor = "multi_thread")]
async fn markup_in_names_is_text() {
    let world = World::new().await;
    let (server, page) = serve(&world).await;
    let setting = Setting {
        workspace: "/w/<img src=x onerror=alert(1)>".to_owned(),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: "\"><script>".to_owned(),
    };
    let filled = Shape::default().fill(|bytes| world.cache.store().put(bytes));
    let id = "\"><script>alert(1)</script>";
    let events = filled.events(&setting, id);
    // A label of the same length, so that the messages stay what they are.
    let marked = events.map(|event| {
        let text = b"//gen/t0:t0";
        let mut event = event;
        while let Some(at) = event.windows(text.len()).position(|part| part == text) {
            event[at..at + text.len()].copy_from_slice(b"//<b>'\"&:x\"");
        }
        event
    });
    play(server.address(), id, "b", marked).await.unwrap();
    let escaped = "%22%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E";
    let body = settled(&page, escaped).await;
    let (_, list) = get_from(&page, &page, "/", "").await;
    let (_, outputs) = get_from(&page, &page, "/outputs?q=%22%3E%3Cscript%3E", "").await;
    for text in [&body, &list, &outputs] {
        assert!(
            !text.contains("<img") && !text.contains("<b>") && !text.contains("<script>"),
            "{text}"
        );
    }
    assert!(body.contains("//&lt;b&gt;'&quot;&amp;:x&quot;"), "{body}");
}

/// Needs root, to be somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_of_the_machine_sees_counts_and_no_names() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("only root can try this");
        return;
    }
    let world = World::new().await;
    let (server, page) = serve(&world).await;
    world.play(&world.build, server.address()).await;
    let port = page.rsplit(':').next().unwrap();
    let as_nobody = async |request: &str| {
        let script = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{request}\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
             cat <&3"
        );
        let mut command = clean(Command::new("bash"));
        command
            .args(["-c", &script])
            .uid(NOBODY)
            .gid(NOBODY)
            .current_dir("/");
        finish(command).await.out()
    };
    let id = world.build.invocation_id();
    for path in [
        "/",
        "/live",
        "/outputs",
        &format!("/build/{id}"),
        &format!("/build/{id}/live"),
        "/disk/usage",
    ] {
        let said = as_nobody(&format!("GET {path} HTTP/1.1")).await;
        assert!(said.starts_with("HTTP/1.1 403"), "{path}: {said}");
        assert!(
            !said.contains("workspace") && said.contains(&format!("user {NOBODY}")),
            "{said}"
        );
    }
    let said =
        as_nobody("POST /get HTTP/1.1\\r\\nX-Outhaul-Page: 1\\r\\nContent-Type: application/json").await;
    assert!(said.starts_with("HTTP/1.1 403"), "{said}");
    let said = as_nobody("GET /metrics HTTP/1.1").await;
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
}

/// A running demo with its page.
struct Demo {
    running: Running,
    page: String,
    _dir: tempfile::TempDir,
}

impl Demo {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = outhaul();
        command
            .arg("demo")
            .arg("--serve")
            .arg(format!("--dir={}", dir.path().join("demo").display()));
        let running = Running::start(command);
        let mut page = String::new();
        until("the demo says where its page is", async || {
            let said = running.stdout();
            let address = said.split("The status page is ").nth(1);
            page = address
                .and_then(|text| text.lines().next())
                .unwrap_or_default()
                .to_owned();
            !page.is_empty()
        })
        .await;
        Self {
            running,
            page: page.trim_end_matches('/').to_owned(),
            _dir: dir,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demos_builds_are_followed_live_in_a_browser() {
    if !peers::are_there("the_demos_builds_are_followed_live_in_a_browser", &PEERS) {
        return;
    }
    let mut demo = Demo::start().await;
    let browser = Browser::open(1200, 760, false).await;
    browser.go(&format!("{}/", demo.page)).await;
    // Nothing is loaded again from here on.
    browser.run("window.isTheSame = true").await;
    let rows = "return document.querySelectorAll('#builds tbody tr').length";
    let count = browser.run(rows).await.as_u64().unwrap();
    until("another build appears", async || {
        browser.run(rows).await.as_u64().unwrap() > count.max(1)
    })
    .await;
    until("it is settled", async || {
        browser.has("#builds .state.settled").await && !browser.has("#builds .state.running").await
    })
    .await;
    browser.shows("live").await;
    // A build while it runs, by the keyboard.
    until("a build runs", async || {
        browser
            .has("#builds tbody tr:first-child .state.running, #builds tbody tr:first-child .state.draining")
            .await
    })
    .await;
    browser
        .run("document.querySelector('#builds tbody a').focus()")
        .await;
    assert_eq!(browser.run("return window.isTheSame").await, true);
    browser.press(&ENTER.to_string()).await;
    browser.shows("Timeline").await;
    browser.run("window.isTheSame = true").await;
    browser.picture("running").await;
    until("it is settled", async || {
        browser
            .has("#summary .state.settled, #summary .state.failed")
            .await
    })
    .await;
    browser.shows("output").await;
    until("the chart has bars", async || {
        browser.has("#timeline svg g rect").await
    })
    .await;
    assert_eq!(browser.run("return window.isTheSame").await, true);
    browser.picture("build").await;
    browser.go(&format!("{}/", demo.page)).await;
    browser.shows("live").await;
    if Browser::takes_pictures() {
        until("there are some builds", async || {
            browser.run(rows).await.as_u64().unwrap() > 6
        })
        .await;
    }
    browser.picture("builds").await;
    browser.assert_quiet(&demo.page).await;
    demo.running.signal(Signal::INT);
    assert_eq!(demo.running.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_build_says_what_to_do_and_the_keyboard_does_it() {
    if !peers::are_there("a_failing_build_says_what_to_do_and_the_keyboard_does_it", &PEERS) {
        return;
    }
    let world = World::new().await;
    let (server, page) = serve(&world).await;
    let lost = world.file("part1.h").1.clone();
    let bytes = world.cache.store().get(&lost).unwrap();
    assert!(world.cache.store().remove(&lost));
    world.play(&world.build, server.address()).await;
    let id = world.build.invocation_id();
    settled(&page, &id).await;
    let browser = Browser::open(1200, 900, true).await;
    browser.go(&format!("http://{page}/build/{id}")).await;
    browser.shows("bazel build //lib:lib").await;
    until("the chart is there", async || browser.has("#timeline svg").await).await;
    browser.picture("failed").await;
    // First of all, the way past the navigation.
    browser.press(&crate::browser::TAB.to_string()).await;
    assert!(browser.has("a.skip:focus").await);
    let button = "#problems button[data-get$='part1.h']";
    browser.tab_to(button).await;
    browser.press(&ENTER.to_string()).await;
    until("it is refused", async || browser.has("#problems .got.bad").await).await;
    browser.shows("evicted from the cache").await;
    world.cache.store().put(bytes);
    browser.tab_to(button).await;
    browser.press(&ENTER.to_string()).await;
    until("it came", async || browser.has("#problems .got.good").await).await;
    assert!(world.exec_root().join(&world.file("part1.h").0.path).exists());
    // Landmarks, labels and names.
    for one in [
        "header nav[aria-label]",
        "main",
        "form[role=search] label[for=q]",
        "section[aria-label=Targets] table caption",
    ] {
        assert!(browser.has(one).await, "{one}");
    }
    let nameless = "return [...document.querySelectorAll('button, a, input:not([type=hidden]), select')].filter(one => \
                    !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).length";
    assert_eq!(browser.run(nameless).await, 0);
    browser.press("/").await;
    browser.press(&format!("style.css{ENTER}")).await;
    until("it is found", async || {
        browser.has("#outputs a[href*='style%2Ecss']").await
    })
    .await;
    browser.assert_quiet(&format!("http://{page}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_outputs_are_paged_and_searched_in_a_browser() {
    if !peers::are_there("ten_thousand_outputs_are_paged_and_searched_in_a_browser", &PEERS) {
        return;
    }
    let world = World::new().await;
    let (server, page) = serve(&world).await;
    // More of them to measure.
    let outputs = number("OUTHAUL_PAGE_OUTPUTS").unwrap_or(10_000) as usize;
    let shape = Shape {
        targets: outputs / 50,
        files_per_target: 50,
        file_size: 100,
        ..Shape::default()
    };
    let setting = Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: world.cache.endpoint(),
        instance_name: String::new(),
    };
    let filled = shape.fill(|bytes| world.cache.store().put(bytes));
    let id = filled.invocation_id(1);
    play(server.address(), &id, "b", filled.events(&setting, &id))
        .await
        .unwrap();
    settled(&page, &id).await;
    // A phone.
    let browser = Browser::open(390, 844, false).await;
    let began = Instant::now();
    browser.go(&format!("http://{page}/build/{id}")).await;
    let interactive =
        "const [it] = performance.getEntriesByType('navigation'); return Math.round(it.domInteractive)";
    let interactive = browser.run(interactive).await;
    eprintln!(
        "a build of {outputs} outputs: loaded in {:?}, interactive after {interactive} ms",
        began.elapsed()
    );
    until("the chart is there", async || browser.has("#timeline svg").await).await;
    browser.picture("phone").await;
    let wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.run(wide).await, 0, "it does not fit on a phone");
    let rows = "return document.querySelectorAll('#outputs tbody tr').length";
    assert_eq!(browser.run(rows).await, 100);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..=outputs / 100 {
        let paths = browser
            .run("return [...document.querySelectorAll('#outputs tbody a')].map(one => one.textContent)")
            .await;
        let paths = paths.as_array().unwrap().clone();
        seen.extend(paths.iter().map(|path| path.as_str().unwrap().to_owned()));
        if !browser.has("#outputs ~ .more a, #outputs .more a").await {
            break;
        }
        let next = browser
            .run("return document.querySelector('#outputs .more a').href")
            .await;
        browser.go(next.as_str().unwrap()).await;
    }
    assert_eq!(seen.len(), outputs);
    browser
        .go(&format!("http://{page}/outputs?q=t7%2Fd0%2Ff49"))
        .await;
    browser.shows("f49.out").await;
    browser.picture("search").await;
    browser.assert_quiet(&format!("http://{page}")).await;
}

//! The admin port: alive, ready, and what was counted.

use outhaul_testkit::until;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::World;

/// Status line and body of a plain request.
async fn get(address: &str, path: &str) -> (String, String) {
    get_from(address, address, path, "").await
}

/// The same as if the address were known by this name, with more headers.
pub(crate) async fn get_from(address: &str, host: &str, path: &str, headers: &str) -> (String, String) {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Connection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn health_readiness_and_counts_are_served() {
    let world = World::new().await;
    let server = world.serve(&["--admin-listen=127.0.0.1:0"]).await;
    let log = server.logged("health and metrics on http://").await;
    let address = log.split("health and metrics on http://").nth(1).unwrap();
    let address = address.lines().next().unwrap().trim();

    let (head, body) = get(address, "/healthz").await;
    assert!(
        head.starts_with("HTTP/1.1 200") && body.contains("ok"),
        "{head}\n{body}"
    );
    let (head, body) = get(address, "/readyz").await;
    assert!(
        head.starts_with("HTTP/1.1 200") && body.contains("ready"),
        "{head}\n{body}"
    );
    assert!(get(address, "/elsewhere").await.0.starts_with("HTTP/1.1 404"));

    world.play(&world.build, server.address()).await;
    let settled = "outhaul_invocations_ended_total{state=\"settled\"} 1";
    let (mut head, mut body) = Default::default();
    // It says so shortly after the last acknowledgement.
    until("the build is settled", async || {
        // As Prometheus asks.
        let accept =
            "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2\r\n";
        (head, body) = get_from(address, address, "/metrics", accept).await;
        body.contains(settled)
    })
    .await;
    assert!(head.contains("application/openmetrics-text"), "{head}");
    for part in [
        settled,
        "outhaul_blobs_total{source=\"batch\",outcome=\"downloaded\"}",
        "outhaul_downloaded_bytes_total",
        "outhaul_queue_depth{lane=\"required\"} 0",
        "outhaul_hold_seconds_count 1",
        "# EOF",
    ] {
        assert!(body.contains(part), "{part} is missing in\n{body}");
    }
}

#[tokio::test]
async fn a_page_whose_name_was_made_to_lead_here_reads_nothing() {
    let world = World::new().await;
    let token = world.path("token");
    std::fs::write(&token, "0123456789abcdef").unwrap();
    for with_token in [false, true] {
        let flag = format!("--admin-token-file={token}");
        let mut args = vec!["--admin-listen=127.0.0.1:0"];
        args.extend(with_token.then_some(flag.as_str()));
        let server = world.serve(&args).await;
        let log = server.logged("health and metrics on http://").await;
        let address = log.split("health and metrics on http://").nth(1).unwrap();
        let address = address.lines().next().unwrap().trim();
        let port = address.rsplit(':').next().unwrap();
        let headers = if with_token {
            "Authorization: Bearer 0123456789abcdef\r\n"
        } else {
            ""
        };
        for path in ["/metrics", "/healthz", "/readyz"] {
            for host in [address, "localhost", &format!("localhost:{port}"), "[::1]:1"] {
                let (head, _) = get_from(address, host, path, headers).await;
                assert!(head.starts_with("HTTP/1.1 200"), "{host}{path}: {head}");
            }
            for host in [
                "evil.example",
                &format!("evil.example:{port}"),
                "127.0.0.1.evil.example",
            ] {
                let (head, body) = get_from(address, host, path, headers).await;
                // With a token, anyone who shows it may use any host name.
                let code = if with_token { "200" } else { "421" };
                assert!(
                    head.starts_with(&format!("HTTP/1.1 {code}")),
                    "{host}{path}: {head}"
                );
                assert!(with_token || body.contains("--admin-token-file"), "{body}");
            }
        }
    }
}

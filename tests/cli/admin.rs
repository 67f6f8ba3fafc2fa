//! The admin port: alive, ready, and what was counted.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::World;

/// Status line and body of a plain request.
async fn get(address: &str, path: &str) -> (String, String) {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
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

    world.play(&world.build, server.door()).await;
    let (head, body) = get(address, "/metrics").await;
    assert!(head.contains("application/openmetrics-text"), "{head}");
    for part in [
        "outhaul_blobs_total{source=\"batch\",outcome=\"downloaded\"}",
        "outhaul_downloaded_bytes_total",
        "outhaul_queue_depth{lane=\"required\"} 0",
        "outhaul_hold_seconds_count 1",
        "outhaul_invocations{state=\"settled\"} 1",
        "# EOF",
    ] {
        assert!(body.contains(part), "{part} is missing in\n{body}");
    }
}

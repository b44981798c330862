//! HTTPS over real sockets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_identity::web::{WebClient, WebError, WebFiles, WebServer, issue};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn made(directory: &Path, host: &str) -> WebFiles {
    issue(directory, &[host.to_owned(), "127.0.0.1".to_owned()]).unwrap()
}

/// One connection: what the client hears, or why it hears nothing.
async fn ask(server: &Arc<WebServer>, client: &WebClient, host: &str) -> Result<String, String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, server) = (listener.local_addr().unwrap(), server.clone());
    let serving = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        if let Ok(mut stream) = server.accept(socket).await {
            let _ = stream.write_all(b"hello").await;
            let _ = stream.shutdown().await;
        }
    });
    let socket = TcpStream::connect(address).await.unwrap();
    let mut heard = String::new();
    let outcome = match client.connect(host, socket).await {
        Ok(mut stream) => stream.read_to_string(&mut heard).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    serving.await.unwrap();
    outcome.map(|_| heard)
}

#[tokio::test]
async fn a_client_speaks_to_the_hosts_of_the_certificate_and_only_if_it_trusts_the_authority() {
    let directory = tempfile::tempdir().unwrap();
    let files = made(&directory.path().join("tls"), "gate.example");
    let server = Arc::new(WebServer::open(&files.certificate, &files.key).unwrap());
    let client = WebClient::new(Some(&files.authority)).unwrap();
    for host in ["gate.example", "127.0.0.1"] {
        assert_eq!(ask(&server, &client, host).await.unwrap(), "hello");
    }
    assert!(ask(&server, &client, "other.example").await.is_err());
    assert!(ask(&server, &WebClient::new(None).unwrap(), "gate.example").await.is_err());
    for (file, mode) in [(&files.key, 0o600), (&directory.path().join("tls"), 0o700)] {
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, mode);
    }
}

#[tokio::test]
async fn renewed_files_count_from_the_next_connection_and_broken_ones_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let files = made(directory.path(), "old.example");
    let server = Arc::new(WebServer::open(&files.certificate, &files.key).unwrap());
    let client = WebClient::new(Some(&files.authority)).unwrap();
    assert!(!server.renew().unwrap(), "nothing has changed");

    // The same authority: whoever trusts it need not be told.
    made(directory.path(), "new.example");
    assert!(server.renew().unwrap());
    assert!(ask(&server, &client, "old.example").await.is_err());
    assert_eq!(ask(&server, &client, "new.example").await.unwrap(), "hello");

    fs::write(&files.certificate, "nonsense").unwrap();
    assert!(matches!(server.renew(), Err(WebError::Pem { .. })));
    assert!(!server.renew().unwrap(), "said once");
    assert_eq!(ask(&server, &client, "new.example").await.unwrap(), "hello");
    fs::remove_file(&files.key).unwrap();
    assert!(matches!(server.renew(), Err(WebError::Pem { .. } | WebError::File { .. })));
    assert_eq!(ask(&server, &client, "new.example").await.unwrap(), "hello");
}

#[test]
fn what_cannot_be_used_is_said_with_its_file() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, other) = (made(one.path(), "a"), made(other.path(), "b"));
    let said = |certificate: &Path, key: &Path| WebServer::open(certificate, key).unwrap_err().to_string();
    assert!(
        said(&one.certificate, &other.key).contains("together"),
        "{}",
        said(&one.certificate, &other.key)
    );
    assert!(said(&one.key, &one.key).contains("holds no certificate"));
    assert!(said(&one.certificate, &one.certificate).contains("holds no private key"));
    assert!(said(Path::new("/nowhere"), &one.key).contains("/nowhere"));
    let directory = tempfile::tempdir().unwrap();
    for wrong in ["", "a b", "a/b", "ä"] {
        assert!(matches!(issue(directory.path(), &[wrong.to_owned()]), Err(WebError::Name(_))), "{wrong}");
    }
}

#[tokio::test]
async fn a_greeting_without_end_is_not_read_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let files = made(directory.path(), "gate.example");
    let server = WebServer::open(&files.certificate, &files.key).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    // Records of a message that says it has 65,531 bytes.
    let mut greeting = vec![0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xfb, 3, 3];
    greeting.resize(5 + (16 << 10), b'a');
    let further = [&[0x16, 3, 1, 0x40, 0][..], &[b'a'; 16 << 10]].concat();
    let sending = async {
        let _ = socket.write_all(&greeting).await;
        let _ = socket.write_all(&further).await;
        // It stays, and says nothing more.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = server.accept(accepted) => {
            assert!(ended.unwrap_err().to_string().contains("the greeting is too long"));
        }
        () = sending => unreachable!("it never ends"),
    }
}

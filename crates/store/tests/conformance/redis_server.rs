//! A real redis-server on a free port of loopback, without persistence.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct RedisServer {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
}

impl RedisServer {
    /// Starts a server; `None`, with a line that says so, where Redis is not installed.
    pub(crate) fn start() -> Option<RedisServer> {
        let port = TcpListener::bind("127.0.0.1:0").expect("bound").local_addr().expect("address").port();
        let folder = tempfile::tempdir().expect("folder");
        match spawn(port, &folder) {
            Ok(child) => Some(RedisServer { child, port, folder }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("SKIPPED: redis-server not found; apt-get install redis-server");
                None
            }
            Err(error) => panic!("redis-server does not start: {error}"),
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// As `kill -9` does: no word to the clients.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }

    /// The same port, and no data.
    pub(crate) fn start_again(&mut self) {
        self.child = spawn(self.port, &self.folder).expect("started again");
    }

    /// Changes a setting of the running server, as `redis-cli config set` does.
    pub(crate) fn set(&self, name: &str, value: &str) {
        use std::io::{Read, Write};
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).expect("connected");
        let words = ["CONFIG", "SET", name, value];
        let words: String = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len())).collect();
        socket.write_all(format!("*4\r\n{words}").as_bytes()).expect("asked");
        let mut answer = [0; 5];
        socket.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"+OK\r\n", "{name} = {value}");
    }

    /// Stops or continues the process, so that it holds connections but does not answer.
    #[cfg(unix)]
    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(status.expect("kill ran").success());
    }
}

fn spawn(port: u16, folder: &tempfile::TempDir) -> std::io::Result<Child> {
    let child = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .arg("--dir")
        .arg(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let start = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "redis-server does not listen on {port}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

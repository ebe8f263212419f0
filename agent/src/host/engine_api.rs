//! Docker's own account of itself, by its Engine API over the unix socket (docs.docker.com, Engine
//! API, `GET /info`). Every question has a deadline: a daemon that hangs does not answer, and that is
//! all that comes of it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// Where Docker listens. To connect starts a Docker that does not run, by its socket unit: ask only
/// one that runs.
const SOCKET: &str = "/run/docker.sock";

/// How long an answer may take. The first one after a start takes seconds on a busy machine.
const DEADLINE: Duration = Duration::from_secs(15);

/// How long an answer may be.
const LONGEST: usize = 4 << 20;

/// What the daemon says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Its version.
    pub version: String,
    /// Its root directory.
    pub root: String,
    /// The graph driver, or the snapshotter, that keeps images and containers' layers.
    pub driver: String,
    /// Whether these are containerd's (the "containerd image store"): then they are in containerd's
    /// root directory, and not in Docker's.
    pub in_containerd: bool,
}

/// The part of `GET /info` that matters (moby, api/types/system/info.go).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    server_version: String,
    docker_root_dir: String,
    driver: String,
    #[serde(default)]
    driver_status: Option<Vec<(String, String)>>,
}

/// What the daemon says is in force, of what the files and flags only ask for. None is what this
/// version does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InForce {
    /// `ServerVersion`, such as `20.10.24+dfsg1`.
    pub version: Option<String>,
    /// `LiveRestoreEnabled`
    pub live_restore: Option<bool>,
    /// `SecurityOptions`, such as `name=seccomp,profile=builtin`.
    pub security: Option<Vec<String>>,
    /// `LoggingDriver`
    pub log_driver: Option<String>,
    /// Whether it is part of a swarm.
    pub swarm: bool,
}

impl InForce {
    /// The number before the first dot of the version; none if Docker does not say it.
    #[must_use]
    pub fn major(&self) -> Option<u32> {
        self.version.as_ref()?.split('.').next()?.parse().ok()
    }
}

/// The same part of `GET /info`, for [`InForce`].
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Answer {
    server_version: Option<String>,
    live_restore_enabled: Option<bool>,
    security_options: Option<Vec<String>>,
    logging_driver: Option<String>,
    swarm: Option<Swarm>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Swarm {
    local_node_state: String,
}

/// Asks the daemon that runs what is in force.
pub async fn in_force() -> Result<InForce> {
    read_in_force(&get(Path::new(SOCKET), "/info", DEADLINE).await?)
}

fn read_in_force(answer: &[u8]) -> Result<InForce> {
    let info: Answer =
        serde_json::from_slice(answer).context("reading what Docker says is in force")?;
    let state = info.swarm.map(|swarm| swarm.local_node_state).unwrap_or_default();
    Ok(InForce {
        version: info.server_version,
        live_restore: info.live_restore_enabled,
        security: info.security_options,
        log_driver: info.logging_driver.filter(|name| !name.is_empty()),
        swarm: !matches!(state.as_str(), "" | "inactive"),
    })
}

/// The network that containers get if nothing else is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// Whether the containers on it reach each other; none if Docker does not say.
    pub icc: Option<bool>,
}

/// Asks the daemon that runs about its default bridge; none if it has none.
pub async fn bridge() -> Result<Option<Bridge>> {
    let path = "/networks/bridge";
    let doing = || format!("asking Docker for {path}");
    match timeout(DEADLINE, exchange(Path::new(SOCKET), path)).await {
        Ok(Ok((StatusCode::NOT_FOUND, _))) => Ok(None),
        Ok(Ok((StatusCode::OK, body))) => read_bridge(&body).map(Some).with_context(doing),
        Ok(Ok((status, _))) => bail!("{}: it answers with the status {status}", doing()),
        Ok(Err(e)) => Err(e).with_context(doing),
        Err(_) => bail!("Docker gives no answer to {path} within {DEADLINE:?}"),
    }
}

fn read_bridge(answer: &[u8]) -> Result<Bridge> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Network {
        #[serde(default)]
        options: Option<std::collections::BTreeMap<String, String>>,
    }
    let network: Network = serde_json::from_slice(answer)?;
    let icc = network.options.unwrap_or_default().remove("com.docker.network.bridge.enable_icc");
    Ok(Bridge { icc: icc.and_then(|text| text.parse().ok()) })
}

/// Whether anybody who connects to this address without a certificate is answered by Docker. Whatever
/// else is there, TLS or a server of another kind, is not Docker's open door. What cannot be connected
/// to, or does not answer, is not known to be closed.
pub async fn is_open(address: SocketAddr) -> Result<bool> {
    answers(address, DEADLINE).await
}

async fn answers(address: SocketAddr, deadline: Duration) -> Result<bool> {
    let ask = async {
        let stream = TcpStream::connect(address).await.context("connecting")?;
        // What comes back and is not Docker's answer, or only the end of the connection, is an answer.
        anyhow::Ok(ping(stream).await.unwrap_or(false))
    };
    let doing = || format!("asking whether Docker answers at {address}");
    match timeout(deadline, ask).await {
        Ok(answer) => answer.with_context(doing),
        Err(_) => bail!("{}: nothing within {deadline:?}", doing()),
    }
}

async fn ping(stream: TcpStream) -> Result<bool> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answer = async move {
        let request = hyper::Request::get("/_ping")
            .header(hyper::header::HOST, "docker")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let headers = response.headers();
        let server = headers.get(hyper::header::SERVER).and_then(|v| v.to_str().ok());
        let docker = server.is_some_and(|name| name.starts_with("Docker/"));
        anyhow::Ok(docker || headers.contains_key("api-version"))
    };
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

/// Asks the daemon that runs.
pub async fn account() -> Result<Account> {
    read(&get(Path::new(SOCKET), "/info", DEADLINE).await?)
}

fn read(answer: &[u8]) -> Result<Account> {
    let info: Info =
        serde_json::from_slice(answer).context("reading what Docker says of itself")?;
    ensure!(
        info.docker_root_dir.starts_with('/') && !info.driver.is_empty(),
        "Docker does not say where it keeps what: root directory {:?}, driver {:?}",
        info.docker_root_dir,
        info.driver
    );
    // Only the containerd image store says what kind of driver it has (moby, daemon/containerd).
    let kind = info.driver_status.iter().flatten().find(|(name, _)| name == "driver-type");
    Ok(Account {
        version: info.server_version,
        root: info.docker_root_dir,
        driver: info.driver,
        in_containerd: kind.is_some_and(|(_, kind)| kind.starts_with("io.containerd.snapshotter")),
    })
}

async fn get(socket: &Path, path: &str, deadline: Duration) -> Result<Bytes> {
    let doing = || format!("asking Docker for {path} at {}", socket.display());
    match timeout(deadline, exchange(socket, path)).await {
        Ok(Ok((StatusCode::OK, body))) => Ok(body),
        Ok(Ok((status, _))) => bail!("{}: it answers with the status {status}", doing()),
        Ok(Err(e)) => Err(e).with_context(doing),
        Err(_) => bail!("Docker gives no answer to {path} within {deadline:?}"),
    }
}

async fn exchange(socket: &Path, path: &str) -> Result<(StatusCode, Bytes)> {
    let stream = UnixStream::connect(socket).await.context("connecting")?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("connecting")?;
    let answer = async move {
        let request = hyper::Request::get(path)
            .header(hyper::header::HOST, "docker")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        match Limited::new(response.into_body(), LONGEST).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(e) => bail!("reading the answer: {e}"),
        }
    };
    // The connection ends when the one who sends is done.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;

    #[test]
    fn both_layouts_are_told_apart() {
        // As Docker 26.1 answers, shortened.
        let overlay2 = br#"{"ID":"x","Containers":1,"Driver":"overlay2","DriverStatus":[["Backing Filesystem","extfs"],["Supports d_type","true"]],"DockerRootDir":"/var/lib/docker","ServerVersion":"26.1.5+dfsg1"}"#;
        let expected = Account {
            version: "26.1.5+dfsg1".into(),
            root: "/var/lib/docker".into(),
            driver: "overlay2".into(),
            in_containerd: false,
        };
        assert_eq!(read(overlay2).unwrap(), expected);
        let snapshotter = br#"{"Driver":"overlayfs","DriverStatus":[["driver-type","io.containerd.snapshotter.v1"]],"DockerRootDir":"/var/lib/docker","ServerVersion":"29.1.3"}"#;
        assert!(read(snapshotter).unwrap().in_containerd);
        let null =
            br#"{"Driver":"vfs","DriverStatus":null,"DockerRootDir":"/d","ServerVersion":"20.10"}"#;
        assert!(!read(null).unwrap().in_containerd);
        for bad in [
            &b"{}"[..],
            b"",
            b"null",
            br#"{"Driver":"","DockerRootDir":"/d","ServerVersion":"1"}"#,
            br#"{"Driver":"overlay2","DockerRootDir":"","ServerVersion":"1"}"#,
        ] {
            assert!(read(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn what_is_in_force_is_read_and_silence_is_not_no() {
        let answer = br#"{"ServerVersion":"20.10.24+dfsg1","LiveRestoreEnabled":false,"SecurityOptions":["name=apparmor","name=seccomp,profile=builtin","name=cgroupns"],"LoggingDriver":"json-file","Swarm":{"LocalNodeState":"inactive","NodeID":""}}"#;
        let seen = read_in_force(answer).unwrap();
        assert_eq!((seen.live_restore, seen.swarm), (Some(false), false));
        assert_eq!((seen.major(), InForce::default().major()), (Some(20), None));
        assert_eq!(seen.security.unwrap()[1], "name=seccomp,profile=builtin");
        assert_eq!(seen.log_driver.as_deref(), Some("json-file"));
        assert_eq!(read_in_force(br#"{"LoggingDriver":""}"#).unwrap(), InForce::default());
        let swarm = br#"{"SecurityOptions":null,"Swarm":{"LocalNodeState":"active"}}"#;
        assert!(read_in_force(swarm).unwrap().swarm);
        assert!(read_in_force(b"1").is_err() && read_in_force(b"").is_err());

        let icc = |text: &str| read_bridge(text.as_bytes()).map(|bridge| bridge.icc);
        let option = "com.docker.network.bridge.enable_icc";
        assert_eq!(icc(&format!(r#"{{"Options":{{"{option}":"true"}}}}"#)).unwrap(), Some(true));
        assert_eq!(icc(&format!(r#"{{"Options":{{"{option}":"false"}}}}"#)).unwrap(), Some(false));
        assert_eq!(icc(&format!(r#"{{"Options":{{"{option}":"x"}}}}"#)).unwrap(), None);
        assert_eq!(icc(r#"{"Options":null}"#).unwrap(), None);
        assert!(icc("nonsense").is_err());
    }

    #[test]
    fn an_open_door_is_told_from_others() {
        let ask = |address| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(answers(address, Duration::from_secs(2)))
        };
        let open = |answer: &'static [u8]| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(answer);
            });
            ask(address).unwrap()
        };
        let docker = b"HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\nServer: Docker/26.1.5 (linux)\r\nContent-Length: 2\r\n\r\nOK";
        assert!(open(docker));
        // Docker with TLS, to somebody who does not speak it; another server; nothing.
        assert!(!open(
            b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
        ));
        assert!(!open(b"HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Length: 0\r\n\r\n"));
        assert!(!open(b""));
        // Nobody takes the connection; nobody listens.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let error = format!("{:#}", ask(address).unwrap_err());
        assert!(error.contains("nothing within 2s"), "{error}");
        drop(listener);
        let error = format!("{:#}", ask(address).unwrap_err());
        assert!(error.contains("connecting: "), "{error}");
    }

    /// A server that answers one request with this, or never with none.
    fn serve(answer: Option<&'static str>) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            match answer {
                Some(answer) => stream.write_all(answer.as_bytes()).unwrap(),
                None => std::thread::sleep(Duration::from_secs(30)),
            }
        });
        (dir, path)
    }

    fn ask(path: &Path) -> Result<Bytes> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(get(path, "/info", Duration::from_millis(300)))
    }

    #[test]
    fn an_answer_is_read_and_a_daemon_that_hangs_is_given_up() {
        let (_dir, path) = serve(Some("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"));
        assert_eq!(&ask(&path).unwrap()[..], b"{}");
        let (_dir, path) = serve(Some("HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"));
        assert!(format!("{:#}", ask(&path).unwrap_err()).contains("status 500"));
        let (_dir, path) = serve(Some("nonsense\r\n\r\n"));
        assert!(ask(&path).is_err());
        let (_dir, path) = serve(None);
        let begun = std::time::Instant::now();
        let error = format!("{:#}", ask(&path).unwrap_err());
        assert!(error.contains("no answer to /info within 300ms"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(ask(Path::new("/no/such/socket")).is_err());
    }
}

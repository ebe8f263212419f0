//! The program as its callers meet it: exit status, standard output and standard error, for the
//! command lines, configurations and surroundings with which no host can be judged. What it does
//! on a host that can is shown by the scenarios of `tests/lab`.
//!
//! Nothing here may change the machine: `provision` is run only with a configuration that `config
//! check` has just refused, or without the rights to change anything.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

/// The program under test.
const HOSTAGENT: &str = env!("CARGO_BIN_EXE_hostagent");

/// A user and group without rights, `nobody` and `nogroup` on Debian and Ubuntu.
const NOBODY: u32 = 65534;

/// The commands that look at the host or change it. All of them are root's, and all of them read
/// the configuration.
const ROOTS: [&str; 4] = ["verify", "plan", "gate", "provision"];

/// How one run ended.
#[derive(Debug)]
struct Ended {
    status: Option<i32>,
    stdout: String,
    stderr: String,
    elapsed: Duration,
}

impl Ended {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// A run of the program with nothing in its environment.
fn hostagent(args: &[&str]) -> Command {
    command(Path::new(HOSTAGENT), args)
}

fn command(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env_clear().stdin(Stdio::null());
    command
}

/// Runs to the end, and not longer than 30 seconds: a program that hangs is a failure, not a test
/// that hangs with it.
fn run(command: &mut Command) -> Ended {
    let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
    let started = Instant::now();
    let mut child = loop {
        match command.spawn() {
            Ok(child) => break child,
            // Another test's child may hold a copy of the program that was just written, until it
            // becomes another program itself.
            Err(e)
                if e.kind() == ErrorKind::ExecutableFileBusy
                    && started.elapsed() < Duration::from_secs(10) =>
            {
                sleep(Duration::from_millis(20));
            }
            Err(e) => panic!("starting {command:?}: {e}"),
        }
    };
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} did not end; it said {:?}", [read(stdout), read(stderr)]);
        }
        sleep(Duration::from_millis(5));
    };
    Ended {
        status: status.code(),
        stdout: read(stdout),
        stderr: read(stderr),
        elapsed: started.elapsed(),
    }
}

/// What a program has written to a file whose offset it shares.
fn read(mut file: File) -> String {
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A directory for configuration files.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The file that `--config` names here.
    fn main(&self) -> PathBuf {
        self.path("hostagent.toml")
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        self.mode(name, 0o644);
        path
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    /// Runs a command with the main file.
    fn run(&self, args: &[&str]) -> Ended {
        run(hostagent(args).arg("--config").arg(self.main()))
    }

    /// Expects every command to refuse the configuration, with one line about the file `name`:
    /// `about` follows the file's path.
    fn refused(&self, name: &str, about: &str) {
        let expected = format!("hostagent: {}{about}", self.path(name).display());
        // First, because it cannot do any harm if it accepts what it should not.
        let mut commands = vec![vec!["config", "check"]];
        if is_root() {
            commands.extend(ROOTS.map(|command| vec![command]));
        }
        for args in commands {
            let ended = self.run(&args);
            assert_eq!(ended.status, Some(78), "{args:?}: expected {expected:?}, got {ended:?}");
            assert!(
                ended.stderr.starts_with(&expected),
                "{args:?}: expected {expected:?}, got {ended:?}"
            );
            assert_eq!(ended.stderr.lines().count(), 1, "{args:?}: {ended:?}");
            assert!(ended.stderr.ends_with('\n'), "{args:?}: {ended:?}");
            assert_eq!(ended.stdout, "", "{args:?}");
        }
    }

    /// Expects `config check` to accept the configuration, read from these files in this order.
    fn accepted(&self, names: &[&str]) {
        let ended = self.run(&["config", "check"]);
        let paths: Vec<String> = names.iter().map(|n| self.path(n).display().to_string()).collect();
        let expected = format!("the configuration is valid ({})\n", paths.join(", "));
        assert_eq!(ended.status, Some(0), "{ended:?}");
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), (expected.as_str(), ""));
    }
}

#[test]
fn a_value_that_cannot_be_right_is_refused_with_file_line_key_and_reason() {
    let table = [
        ("[sshd]\nport = 0\n", ":2: sshd.port: 0 is not a TCP port"),
        ("[sshd]\nport = \"2222\"\n", ":2: sshd.port: invalid type: string"),
        ("# 1\n\n[sshd]\nprot = 2222\n", ":4: sshd.prot: unknown field `prot`"),
        ("[ssh]\nport = 2222\n", ":1: ssh: unknown field `ssh`"),
        ("[volume]\nmount_point = \"data\"\n", ":2: volume.mount_point: must be an absolute path"),
        ("[volume]\nmount_point = \"/\"\n", ":2: volume.mount_point: belongs to the system"),
        (
            "[volume]\nmount_point = \"/var/lib/docker\"\n",
            ":2: volume.mount_point: belongs to the system",
        ),
        (
            "[volume]\nmount_point = \"/var/lib/docker/volumes\"\n",
            ":2: volume.mount_point: belongs to the system",
        ),
        ("[volume]\ndevice = \"/dev/nvme1n1\"\n", ":2: volume.device: is a kernel name"),
        ("[instance]\ntenancy = [\"default\"]\n", ":2: instance.tenancy: unknown variant"),
        ("[run]\ndeadline_seconds = 0\n", ":2: run.deadline_seconds: 0 is out of range"),
        ("[run]\ndeadline_seconds = 500\n", ": volume.wait_seconds: is not shorter than"),
        ("[sshd\n", ":1: "),
    ];
    for (text, about) in table {
        let files = Files::new();
        files.write("hostagent.toml", text);
        files.refused("hostagent.toml", about);
    }
}

#[test]
fn a_list_in_place_of_a_section_is_refused() {
    for text in ["sshd = [22]\n", "[[sshd]]\nport = 22\n", "volume = []\n"] {
        let files = Files::new();
        files.write("hostagent.toml", text);
        files.refused("hostagent.toml", ":1: ");
    }
}

#[test]
fn the_message_is_one_line_of_plain_text_whatever_the_file_says() {
    for text in ["\"a\\nb\" = 1\n", "\"\\u001b[2J\" = 1\n", "sshd.port = \"\\u001b[2J\"\n"] {
        let files = Files::new();
        files.write("hostagent.toml", text);
        files.refused("hostagent.toml", ":1: ");
        let said = files.run(&["config", "check"]).stderr;
        assert!(!said.trim_end().chars().any(char::is_control), "{said:?}");
    }
}

#[test]
fn a_file_that_others_can_write_is_refused() {
    for (mode, shown) in [(0o666, "0666"), (0o646, "0646"), (0o664, "0664"), (0o620, "0620")] {
        for name in ["hostagent.toml", "conf.d/10-site.toml"] {
            let files = Files::new();
            files.write("hostagent.toml", "");
            files.write(name, "");
            files.mode(name, mode);
            let about = format!(": is writable by others than its owner (mode {shown})");
            files.refused(name, &about);
        }
    }
}

#[test]
fn a_file_of_another_user_is_refused() {
    if !is_root() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    let files = Files::new();
    let path = files.write("hostagent.toml", "");
    chown(&path, Some(NOBODY), None).unwrap();
    files.refused("hostagent.toml", ": belongs to user 65534, not to root");
}

#[test]
fn what_cannot_be_read_is_refused() {
    let files = Files::new();
    files.refused("hostagent.toml", ": cannot be read: No such file");
    symlink("nowhere", files.main()).unwrap();
    files.refused("hostagent.toml", ": cannot be read: No such file");
    fs::remove_file(files.main()).unwrap();
    fs::create_dir(files.main()).unwrap();
    files.refused("hostagent.toml", ": is not a regular file");
    fs::remove_dir(files.main()).unwrap();
    files.write("hostagent.toml", b"[signal]\nstack = \"\xff\"\n");
    files.refused("hostagent.toml", ": cannot be read: stream did not contain valid UTF-8");

    files.write("hostagent.toml", "");
    files.write("conf.d", "");
    files.refused("conf.d", ": cannot be listed: Not a directory");
    fs::remove_file(files.path("conf.d")).unwrap();
    fs::create_dir(files.path("conf.d")).unwrap();
    symlink("nowhere", files.path("conf.d/10-site.toml")).unwrap();
    files.refused("conf.d/10-site.toml", ": cannot be read: No such file");
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    for name in ["hostagent.toml", "conf.d/10-site.toml"] {
        let files = Files::new();
        files.write("hostagent.toml", "");
        let path = files.write(name, "");
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        files.refused(name, ": is not a regular file");
    }
}

#[test]
fn fragments_are_read_after_the_file_in_the_order_of_their_names() {
    // By default a run ends after 1800 seconds, of which it waits for the volume at most 600.
    let files = Files::new();
    files.write("hostagent.toml", "[run]\ndeadline_seconds = 500\n");
    files.refused("hostagent.toml", ": volume.wait_seconds: is not shorter than");
    files.write("conf.d/10-wait.toml", "[volume]\nwait_seconds = 400\n");
    files.accepted(&["hostagent.toml", "conf.d/10-wait.toml"]);
    let both = "[volume]\nwait_seconds = 300\n[run]\ndeadline_seconds = 300\n";
    files.write("conf.d/20-both.toml", both);
    files.refused("conf.d/20-both.toml", ": volume.wait_seconds: is not shorter than");
    files.write("conf.d/30-run.toml", "[run]\ndeadline_seconds = 900\n");
    // Anything else beside them is nobody's business.
    files.write("conf.d/README", "not TOML");
    files.write("conf.d/40-run.toml.disabled", "not TOML");
    files.accepted(&[
        "hostagent.toml",
        "conf.d/10-wait.toml",
        "conf.d/20-both.toml",
        "conf.d/30-run.toml",
    ]);
    files.write("conf.d/25-sshd.toml", "# ours\n[sshd]\nport = 0\n");
    files.refused("conf.d/25-sshd.toml", ":3: sshd.port: 0 is not a TCP port");
}

#[test]
fn wrong_usage() {
    let table: [&[&str]; 17] = [
        &[],
        &["nonsense"],
        &["--nonsense"],
        &["verify", "--nonsense"],
        &["verify", "nonsense"],
        &["verify", "--format", "xml"],
        &["verify", "--only"],
        &["verify", "--only", "nonsense"],
        &["verify", "--skip", "sshd-port,nonsense"],
        &["plan", "--only", "Sshd-Port"],
        &["plan", "--only", "sshd-port", "--skip", "sshd-port"],
        &["gate", "--format", "json"],
        &["explain"],
        &["explain", "nonsense"],
        &["explain", "sshd-port", "data-volume"],
        &["config"],
        &["config", "nonsense"],
    ];
    for args in table {
        let ended = run(&mut hostagent(args));
        assert_eq!(ended.status, Some(64), "{args:?}: {ended:?}");
        assert_eq!(ended.stdout, "", "{args:?}");
        assert!(!ended.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn help_and_version() {
    let commands =
        ["provision", "plan", "verify", "explain", "gate", "status", "controls", "config"];
    let help = run(&mut hostagent(&["--help"]));
    assert_eq!((help.status, help.stderr.as_str()), (Some(0), ""));
    for command in commands {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{command}: {}", help.stdout);
        let ended = run(&mut hostagent(&[command, "--help"]));
        assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""), "{command}");
        assert!(ended.stdout.contains("Usage: hostagent"), "{command}");
    }
    let version = run(&mut hostagent(&["--version"]));
    assert_eq!((version.status, version.stderr.as_str()), (Some(0), ""));
    assert_eq!(version.stdout, concat!("hostagent ", env!("CARGO_PKG_VERSION"), "\n"));
}

/// The ids of all controls, in order.
fn ids(list: &Value) -> Vec<String> {
    let text = |control: &Value| control["id"].as_str().expect("an id").to_owned();
    list.as_array().expect("a list").iter().map(text).collect()
}

fn controls() -> Vec<String> {
    let ended = run(&mut hostagent(&["controls", "--format", "json"]));
    assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""));
    ids(&ended.json())
}

#[test]
fn the_list_of_controls_is_the_same_in_both_forms_and_names_each_once() {
    let listed = controls();
    assert!(!listed.is_empty());
    let mut unique = listed.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), listed.len(), "{listed:?}");
    let ended = run(&mut hostagent(&["controls"]));
    assert_eq!((ended.status, ended.stderr.as_str()), (Some(0), ""));
    let first = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    assert_eq!(ended.stdout.lines().map(first).collect::<Vec<_>>(), listed);
}

#[test]
fn output_that_cannot_be_written_is_not_success() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut child = hostagent(&["controls"]).stdout(full).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(70));
}

/// A copy of the program where everybody can run it: the build may be in a closed directory.
struct Nobody {
    dir: TempDir,
}

impl Nobody {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::copy(HOSTAGENT, dir.path().join("hostagent")).unwrap();
        Self { dir }
    }

    /// A run without any rights.
    fn hostagent(&self, args: &[&str]) -> Command {
        let mut command = command(&self.dir.path().join("hostagent"), args);
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

#[test]
fn what_is_roots_is_refused_to_others() {
    let nobody = Nobody::new();
    for args in ROOTS.map(|name| vec![name]).into_iter().chain([vec!["explain", "data-volume"]]) {
        let name = args[0];
        let ended = run(&mut nobody.hostagent(&args));
        assert_eq!(ended.status, Some(77), "{name}: {ended:?}");
        assert_eq!(ended.stdout, "", "{name}");
        assert_eq!(ended.stderr, format!("hostagent: `hostagent {name}` must be run as root\n"));
    }
    for args in [&["controls"][..], &["--help"], &["--version"]] {
        let ended = run(&mut nobody.hostagent(args));
        assert_eq!(ended.status, Some(0), "{args:?}: {ended:?}");
    }
}

#[test]
fn a_file_that_the_caller_may_not_read_is_refused() {
    let (nobody, files) = (Nobody::new(), Files::new());
    files.write("hostagent.toml", "");
    files.mode("hostagent.toml", 0o000);
    let ended = run(nobody.hostagent(&["config", "check", "--config"]).arg(files.main()));
    let expected = format!("hostagent: {}: cannot be read: ", files.main().display());
    assert_eq!(ended.status, Some(78), "{ended:?}");
    assert!(ended.stderr.starts_with(&expected), "{ended:?}");
    assert_eq!((ended.stderr.lines().count(), ended.stdout.as_str()), (1, ""), "{ended:?}");
}

/// When the places where a run leaves something behind were last changed.
fn traces() -> [Option<SystemTime>; 2] {
    ["/run/hostagent", "/var/lib/hostagent"].map(|dir| fs::metadata(dir).ok()?.modified().ok())
}

/// Expects `verify`, on a machine that is no EC2 instance and with the metadata service at `port`,
/// to say in good time that it knows nothing, and to leave nothing behind.
fn knows_nothing(port: u16) {
    let vendor = fs::read_to_string("/sys/class/dmi/id/sys_vendor").unwrap_or_default();
    if vendor.trim() == "Amazon EC2" || !is_root() {
        eprintln!("skipped: on EC2 there is something to know, and `verify` is root's");
        return;
    }
    let before = traces();
    let endpoint = format!("http://127.0.0.1:{port}");
    let mut verify = hostagent(&["verify", "--format", "json"]);
    let ended = run(verify.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint));
    assert_eq!(ended.status, Some(2), "{ended:?}");
    assert!(ended.elapsed < Duration::from_secs(10), "{:?}", ended.elapsed);
    let report = ended.json();
    assert_eq!((&report["result"], &report["complete"]), (&"unknown".into(), &true.into()));
    assert_eq!(ids(&report["controls"]), controls());
    for control in report["controls"].as_array().unwrap() {
        let verdict = &control["verdict"];
        assert_eq!(verdict["status"], "unknown", "{control}");
        let why = verdict["why"].as_str().unwrap_or_default();
        assert!(why.contains("not known to be an EC2 instance"), "{control}");
    }
    assert_eq!(traces(), before);
}

/// A listener on a port of its own.
fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn nothing_is_known_where_no_metadata_service_listens() {
    let (closed, port) = listener();
    drop(closed);
    knows_nothing(port);
}

#[test]
fn nothing_is_known_where_the_metadata_service_never_answers() {
    // Connections are made by the kernel and wait for somebody to accept them.
    let (_silent, port) = listener();
    knows_nothing(port);
}

#[test]
fn nothing_is_known_where_the_metadata_service_never_finishes_an_answer() {
    let (slow, port) = listener();
    std::thread::spawn(move || {
        for stream in slow.incoming().flatten() {
            std::thread::spawn(|| drip(stream));
        }
    });
    knows_nothing(port);
}

/// Gives a token at once, and then a document of which a byte comes now and then. Ends with its peer.
fn drip(mut stream: TcpStream) {
    const TOKEN: &str = "HTTP/1.1 200 OK\r\nx-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\
                         content-length: 5\r\n\r\ntoken";
    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n";
    let mut request = [0; 4096];
    while let Ok(1..) = stream.read(&mut request) {
        let token = request.starts_with(b"PUT ");
        let answer = if token { TOKEN } else { HEAD };
        let mut alive = stream.write_all(answer.as_bytes()).is_ok();
        while alive && !token {
            sleep(Duration::from_millis(200));
            alive = stream.write_all(b" ").is_ok();
        }
    }
}

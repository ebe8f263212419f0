//! The guest agent: runs commands inside an instance over a virtio port, with no network and no
//! sshd between. Scenarios that move sshd or stop the network still have their hands on the host.

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a command may take unless the caller says otherwise.
const DEADLINE: Duration = Duration::from_mins(1);

/// How much of a file travels in one message.
const CHUNK: usize = 48 * 1024;

/// A connection to the agent of one instance.
pub struct Guest {
    stream: UnixStream,
    received: Vec<u8>,
    synchronised: u64,
}

/// How a command in the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The exit status; 128 and the signal's number when a signal ended it, as a shell says it.
    pub status: i64,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A command for the guest: a shell script, with what differs from the usual.
#[derive(Debug, Clone)]
pub struct Script<'a> {
    text: &'a str,
    environment: Vec<String>,
    deadline: Duration,
}

impl<'a> Script<'a> {
    /// A script for `sh -c`, as root.
    pub fn new(text: &'a str) -> Self {
        Self { text, environment: Vec::new(), deadline: DEADLINE }
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        self
    }

    /// Sets how long it may take.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

impl Guest {
    /// Connects to QEMU's end of the port. Whether the agent runs is another question.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Self> {
        let stream = crate::qmp::connect(path, deadline)?;
        // A guest that stands still takes nothing, and what is written piles up.
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self { stream, received: Vec::new(), synchronised: 0 })
    }

    /// Waits until the agent answers, and drops whatever it still had to say to somebody else.
    pub fn wait(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            self.synchronised += 1;
            let id = self.synchronised + u64::from(std::process::id()) * 1000;
            let request = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
            // The byte 0xff makes the agent drop a half-received request.
            let message = [&[0xff], request.to_string().as_bytes(), b"\n"].concat();
            match self.stream.write_all(&message) {
                Err(error) if is_time_out(&error) => {}
                written => written.context("writing to the guest agent")?,
            }
            let until = end.min(Instant::now() + Duration::from_secs(1));
            while let Some(answer) = self.read(until)? {
                if answer["return"] == id {
                    return Ok(());
                }
            }
            ensure!(Instant::now() < end, "the guest agent does not answer within {deadline:?}");
        }
    }

    /// Runs a script, which must succeed; returns its standard output.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.succeed(&Script::new(script))
    }

    /// Runs a script, which must succeed; returns its standard output.
    pub fn succeed(&mut self, script: &Script) -> Result<String> {
        let ended = self.run(script)?;
        ensure!(
            ended.status == 0,
            "in the guest, `{}` ended with status {}\n{}{}",
            script.text,
            ended.status,
            crate::command::tail(&ended.stdout, 15),
            crate::command::tail(&ended.stderr, 15),
        );
        Ok(ended.stdout)
    }

    /// Runs a script and says how it ended.
    pub fn run(&mut self, script: &Script) -> Result<Ended> {
        let arguments = json!({
            "path": "/bin/sh",
            "arg": ["-c", script.text],
            "env": environment(&script.environment),
            "capture-output": true,
        });
        let started = self.ask("guest-exec", &arguments)?;
        let pid = started["pid"].as_i64().context("guest-exec gave no pid")?;
        let end = Instant::now() + script.deadline;
        let mut pause = Duration::from_millis(5);
        loop {
            let status = self.ask("guest-exec-status", &json!({ "pid": pid }))?;
            if status["exited"] == true {
                return Ok(Ended {
                    status: status["exitcode"]
                        .as_i64()
                        .unwrap_or_else(|| 128 + status["signal"].as_i64().unwrap_or(0)),
                    stdout: text(&status["out-data"]),
                    stderr: text(&status["err-data"]),
                });
            }
            ensure!(
                Instant::now() < end,
                "in the guest, `{}` did not end within {:?}",
                script.text,
                script.deadline
            );
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// Starts a script that ends the guest, or outlives the connection: nobody waits for it.
    pub fn start(&mut self, script: &str) -> Result<()> {
        let arguments = json!({
            "path": "/bin/sh",
            "arg": ["-c", script],
            "env": environment(&[]),
        });
        self.ask("guest-exec", &arguments).map(drop)
    }

    /// Runs a script again and again until it succeeds; returns its standard output.
    pub fn until(&mut self, script: &str, deadline: Duration) -> Result<String> {
        let end = Instant::now() + deadline;
        loop {
            let ended = self.run(&Script::new(script))?;
            if ended.status == 0 {
                return Ok(ended.stdout);
            }
            ensure!(
                Instant::now() < end,
                "in the guest, `{script}` did not succeed within {deadline:?}; last: status {}\n{}{}",
                ended.status,
                crate::command::tail(&ended.stdout, 10),
                crate::command::tail(&ended.stderr, 10),
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Writes a file.
    pub fn write(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let handle = self.ask("guest-file-open", &json!({ "path": path, "mode": "w" }))?;
        for chunk in content.chunks(CHUNK) {
            let arguments = json!({ "handle": handle, "buf-b64": BASE64.encode(chunk) });
            let written = self.ask("guest-file-write", &arguments)?;
            ensure!(
                written["count"].as_u64() == Some(chunk.len() as u64),
                "writing {path} in the guest: only {} of {} bytes were written",
                written["count"],
                chunk.len()
            );
        }
        self.ask("guest-file-close", &json!({ "handle": handle })).map(drop)
    }

    /// Sets the guest's clock to this machine's. After a restored snapshot it stands where the
    /// snapshot left it.
    pub fn set_clock(&mut self) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        self.sh(&format!("date -s @{now:.3}")).map(drop)
    }

    /// The id of the current boot.
    pub fn boot_id(&mut self) -> Result<String> {
        Ok(self.sh("cat /proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }

    /// Sends one request and returns what the agent returns.
    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream, "{request}").context("writing to the guest agent")?;
        let answer = self.read(Instant::now() + DEADLINE)?;
        let Some(mut answer) = answer else {
            bail!("the guest agent did not answer {command} within {DEADLINE:?}");
        };
        if let Some(error) = answer.get("error") {
            bail!("guest agent: {command}: {}", error["desc"].as_str().unwrap_or("no reason"));
        }
        Ok(answer["return"].take())
    }

    /// The next answer, or nothing when time is up.
    fn read(&mut self, until: Instant) -> Result<Option<Value>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
                match serde_json::from_slice(&line[start..]) {
                    Ok(answer) => return Ok(Some(answer)),
                    // The rest of an answer that was cut off by a reboot.
                    Err(_) => continue,
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 8192];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the guest is gone: QEMU has closed the agent's port"),
                Ok(length) => self.received.extend_from_slice(&buffer[..length]),
                Err(error) if is_time_out(&error) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading from the guest agent"),
            }
        }
    }
}

fn is_time_out(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The environment of a command: the agent passes on nothing of its own.
fn environment(more: &[String]) -> Vec<String> {
    let usual = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/root",
        "LC_ALL=C.UTF-8",
        "AWS_ENDPOINT_URL=http://169.254.169.5",
    ];
    usual.iter().map(ToString::to_string).chain(more.iter().cloned()).collect()
}

/// Captured output, which travels as base64 and may be absent.
fn text(data: &Value) -> String {
    let bytes = BASE64.decode(data.as_str().unwrap_or_default()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

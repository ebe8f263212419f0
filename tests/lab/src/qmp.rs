//! QEMU's machine protocol over its Unix socket: one JSON object per line, each way.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Saving a snapshot is the longest command.
const DEADLINE: Duration = Duration::from_mins(2);

/// A connection to the monitor of one QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects, and waits for QEMU to have the socket.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Self> {
        let stream = connect(path, deadline)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut qmp = Self { reader: BufReader::new(stream.try_clone()?), writer: stream };
        ensure!(qmp.read()?.get("QMP").is_some(), "{} is not a QMP socket", path.display());
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}")
            .with_context(|| format!("sending {command} to QEMU (did it end?)"))?;
        loop {
            let mut answer = self.read().with_context(|| format!("QEMU command {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU command {request}: {}", error["desc"].as_str().unwrap_or("no reason"));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            // Anything else is an event.
        }
    }

    /// Runs a command of the human monitor; whatever it prints is a complaint.
    pub fn human(&mut self, line: &str) -> Result<()> {
        let said = self.execute("human-monitor-command", &json!({ "command-line": line }))?;
        let said = said.as_str().unwrap_or_default().trim();
        ensure!(said.is_empty(), "QEMU monitor command `{line}`: {said}");
        Ok(())
    }

    /// Waits for an event.
    pub fn event(&mut self, name: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no {name} event from QEMU within {deadline:?}");
            self.writer.set_read_timeout(Some(left))?;
            let message = self.read();
            self.writer.set_read_timeout(Some(DEADLINE))?;
            let message = message.with_context(|| format!("waiting for the {name} event"))?;
            if message["event"] == name {
                return Ok(());
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("reading from QEMU")?;
        ensure!(length > 0, "QEMU has ended");
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}"))
    }
}

/// Connects to a Unix socket that is about to exist.
pub fn connect(path: &Path, deadline: Duration) -> Result<UnixStream> {
    let end = Instant::now() + deadline;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= end => {
                return Err(error).with_context(|| format!("connecting to {}", path.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

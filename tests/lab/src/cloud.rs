//! The simulated cloud of one instance: starts `tests/cloud/cloud.py` in a Python environment made
//! for it, and speaks to its admin interface. Each scenario has a cloud of its own.

mod model;

use crate::cache::{self, Key, workspace};
use crate::command::run;
use crate::progress::Step;
use crate::qemu;
use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub use model::{Call, Completion, Fault, Group, Instance, Signal, Stack, Volume};

/// Where the guest finds what was given to [`Cloud::put_file`].
pub const FILES_URL: &str = "http://169.254.169.5/lab/files";

/// The ports of one simulated cloud on this machine's loopback.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ports {
    /// The instance metadata service.
    pub imds: u16,
    /// The AWS APIs.
    pub api: u16,
    /// The lab's own interface: what exists, what fails, what was called.
    pub admin: u16,
}

/// A running simulated cloud; it ends with this value, or with the lab.
pub struct Cloud {
    /// Absent where another process of the lab holds the cloud.
    process: Option<Child>,
    ports: Ports,
    agent: ureq::Agent,
}

impl Cloud {
    /// Starts a cloud with nothing in it. Its log goes to a file in `dir`.
    pub fn start(dir: &Path) -> Result<Self> {
        let program = directory().join("cloud.py");
        let mut process = Command::new(python()?)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .arg(&program)
            .arg("--log")
            .arg(dir.join("cloud.log"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(dir.join("cloud.err"))?)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut line = String::new();
        if let Some(stdout) = process.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).context("reading the cloud's ports")?;
        }
        let ports = serde_json::from_str(&line).with_context(|| {
            let _ = process.kill();
            let _ = process.wait();
            let said = std::fs::read_to_string(dir.join("cloud.err")).unwrap_or_default();
            format!("the simulated cloud said {line:?} instead of its ports\n{said}")
        })?;
        let mut cloud = Self::attach_to(ports);
        cloud.process = Some(process);
        Ok(cloud)
    }

    /// Speaks to a cloud that another process holds.
    pub fn attach_to(ports: Ports) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(30)))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        Self { process: None, ports, agent }
    }

    /// Where it listens.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Forgets everything.
    pub fn reset(&self) -> Result<()> {
        self.send("POST", "/reset", &json!({}))
    }

    /// Sets what the instance is, a new one or the one with this id.
    pub fn instance(&self, instance: &Instance) -> Result<()> {
        self.send("POST", "/instance", instance)
    }

    /// Changes some properties of the instance.
    pub fn change_instance(&self, id: &str, changes: &Value) -> Result<()> {
        self.send("PATCH", &format!("/instance/{id}"), changes)
    }

    /// Creates a volume.
    pub fn volume(&self, volume: &Volume) -> Result<()> {
        self.send("POST", "/volume", volume)
    }

    /// Changes some properties of a volume.
    pub fn change_volume(&self, id: &str, changes: &Value) -> Result<()> {
        self.send("PATCH", &format!("/volume/{id}"), changes)
    }

    /// Says in the API that a volume is attached; the disk itself is [`crate::vm::Vm::plug_nvme`].
    /// What is attached at launch also stands in the metadata's block device mapping.
    pub fn attach(&self, volume: &str, device: &str, at_launch: bool) -> Result<()> {
        self.attach_to_instance(qemu::INSTANCE_ID, volume, device, at_launch)
    }

    /// As [`Cloud::attach`], to another instance than the usual.
    pub fn attach_to_instance(
        &self,
        instance: &str,
        volume: &str,
        device: &str,
        at_launch: bool,
    ) -> Result<()> {
        let body = json!({
            "volume": volume,
            "instance": instance,
            "device": device,
            "state": "attached",
            "at_launch": at_launch,
        });
        self.send("POST", "/attach", &body)
    }

    /// Says in the API that a volume is attached to nothing.
    pub fn detach(&self, volume: &str) -> Result<()> {
        self.send("POST", "/detach", &json!({ "volume": volume }))
    }

    /// Creates a CloudFormation stack that waits for `count` signals.
    pub fn stack(&self, name: &str, resources: &[&str], count: u32) -> Result<()> {
        let body = json!({
            "name": name,
            "status": "CREATE_IN_PROGRESS",
            "resources": resources,
            "count": count,
        });
        self.send("POST", "/stack", &body)
    }

    /// What a stack has been told.
    pub fn stack_state(&self, name: &str) -> Result<Stack> {
        self.get(&format!("/stack/{name}"))
    }

    /// Creates an Auto Scaling group with the instance in a lifecycle state, waiting at a hook.
    pub fn group(&self, name: &str, state: &str, hook: &str) -> Result<()> {
        let instance = qemu::INSTANCE_ID;
        let body = json!({ "name": name, "instance": instance, "state": state, "hook": hook });
        self.send("POST", "/group", &body)
    }

    /// What a group has been told.
    pub fn group_state(&self, name: &str) -> Result<Group> {
        self.get(&format!("/group/{name}"))
    }

    /// Switches a fault on.
    pub fn fault(&self, fault: &Fault) -> Result<()> {
        self.send("POST", "/faults", fault)
    }

    /// Switches all faults off.
    pub fn clear_faults(&self) -> Result<()> {
        let url = self.url("/faults");
        let answer = self.agent.delete(&url).call().with_context(|| format!("DELETE {url}"))?;
        accept::<Value>("DELETE", &url, answer).map(drop)
    }

    /// Every call to an AWS API so far, in order. The metadata service has too many to be listed.
    pub fn calls(&self) -> Result<Vec<Call>> {
        self.get("/calls")
    }

    /// Serves a file to the guest, under [`FILES_URL`].
    pub fn put_file(&self, name: &str, content: &[u8]) -> Result<()> {
        let url = self.url(&format!("/files/{name}"));
        let answer = self.agent.put(&url).send(content).with_context(|| format!("PUT {url}"))?;
        accept::<Value>("PUT", &url, answer).map(drop)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let url = self.url(path);
        let answer = self.agent.get(&url).call().with_context(|| format!("GET {url}"))?;
        let value = accept("GET", &url, answer)?;
        serde_json::from_value(value).with_context(|| format!("the answer to GET {url}"))
    }

    fn send(&self, method: &str, path: &str, body: &impl Serialize) -> Result<()> {
        let url = self.url(path);
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(&url)
            .header("Content-Type", "application/json")
            .body(serde_json::to_vec(body)?)?;
        let answer = self.agent.run(request).with_context(|| format!("{method} {url}"))?;
        accept::<Value>(method, &url, answer).map(drop)
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.ports.admin)
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Turns an answer into a value; any status but success is an error with what the cloud said.
fn accept<T: DeserializeOwned + Default>(
    method: &str,
    url: &str,
    mut answer: ureq::http::Response<ureq::Body>,
) -> Result<T> {
    let text = answer.body_mut().read_to_string().with_context(|| format!("{method} {url}"))?;
    anyhow::ensure!(
        answer.status().is_success(),
        "the simulated cloud refused {method} {url}: {} {text}",
        answer.status()
    );
    if text.trim().is_empty() {
        return Ok(T::default());
    }
    serde_json::from_str(&text).with_context(|| format!("{method} {url} answered {text:?}"))
}

/// The directory of the simulated cloud.
pub fn directory() -> PathBuf {
    workspace().join("tests/cloud")
}

/// The Python of the cloud's environment, which is made if need be.
pub fn python() -> Result<PathBuf> {
    let requirements = directory().join("requirements.txt");
    let version = run(Command::new("/usr/bin/python3").arg("--version"))?;
    let key = Key::new().with(version).with_file(&requirements)?;
    let environment = cache::entry("venv", &key, |dir| {
        let step = Step::begin("installing the simulated cloud's Python packages (a minute)");
        run(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(dir))?;
        run(Command::new(dir.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .arg("--requirement")
            .arg(&requirements))?;
        step.done();
        Ok(())
    })?;
    Ok(environment.join("bin/python"))
}

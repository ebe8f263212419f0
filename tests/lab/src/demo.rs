//! The demo: an instance that boots before somebody's eyes, is made ready by its user-data, and
//! stays for a look around. Its cloud and its QEMU are children of a process of their own, which
//! outlives the command; a lock that this process holds says that the demo runs.

use crate::cache::{self, copy_disk};
use crate::cloud::{Cloud, Instance, Ports, Volume};
use crate::command::run as run_command;
use crate::guest::Script;
use crate::image::{DEFAULT_RELEASE, Image};
use crate::progress::{human, say};
use crate::qemu::{Machine, Nvme, SERIAL_LOG};
use crate::vm::{BOOT, Vm, spawn};
use crate::{disk, host, package, snapshot, userdata};
use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The volume that is attached to the instance.
const VOLUME: &str = "vol-0123456789abcdef0";

/// The user of the image, as in Debian's own EC2 images.
const USER: &str = "admin";

/// How long the instance may take to become ready once it has booted.
const READY: Duration = Duration::from_mins(10);

/// What the holder tells the commands.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    pid: i32,
    ports: Ports,
    /// The port here that leads to 2222 there.
    ssh: u16,
    /// The port here that leads to 22 there.
    ssh_before: u16,
}

/// Runs the demo, with a package that is built for it unless one is given.
pub fn run(deb: Option<PathBuf>) -> Result<()> {
    let started = Instant::now();
    host::prepare()?;
    let package = package::given_or_built(deb)?;
    Image::of(DEFAULT_RELEASE)?;
    crate::cloud::python()?;
    stop()?;

    let dir = directory()?;
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    copy_disk(&package, &dir.join("hostagent.deb"))?;
    run_command(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"])
            .arg(dir.join("key")),
    )?;
    say("booting an instance; from here on, what its serial console says (shortened)");
    let state = hold_in_background(&dir)?;
    let mut console = Console::new(&dir);
    let mut vm = Vm::attach(&dir)?;
    console.until("the guest's first sign of life", BOOT, || {
        vm.guest.wait(Duration::from_millis(200)).is_ok()
    })?;
    console.until("cloud-init to start hostagent", BOOT, || {
        vm.guest.sh("systemctl is-active hostagent.service | grep -v inactive").is_ok()
    })?;

    say(format!("attaching the encrypted volume {VOLUME} as /dev/sdf"));
    attach(&Cloud::attach_to(state.ports), &mut vm, &dir)?;
    let mut failed = false;
    console.until("the instance to become ready", READY, || {
        failed = vm.guest.sh("systemctl is-failed -q hostagent.service").is_ok();
        failed || vm.guest.sh("systemctl is-active -q hostagent-ready.target").is_ok()
    })?;
    if failed {
        let journal = vm.guest.sh("journalctl -b --no-pager -u hostagent.service | tail -n 50")?;
        bail!("hostagent refused this instance (`cargo lab stop` ends it):\n{journal}");
    }
    say(format!("ready {} after the start of this command", human(started.elapsed())));
    let report = vm.guest.run(&Script::new("hostagent verify"))?;
    println!("\n$ hostagent verify\n{}{}", report.stdout, report.stderr);
    println!(
        "The instance goes on running.\n  \
         cargo lab shell                        a shell in it\n  \
         cargo lab shell sudo hostagent verify  one command\n  \
         cargo lab stop                         the end of it"
    );
    Ok(())
}

/// Opens a shell in the demo's instance, or runs a command there.
pub fn shell(command: &[String]) -> Result<ExitCode> {
    let dir = directory()?;
    let Some(state) = running(&dir)? else {
        bail!("no instance runs: `cargo lab demo` starts one");
    };
    let port = if answers(state.ssh) { state.ssh } else { state.ssh_before };
    let known = dir.join("known_hosts");
    let status = Command::new("ssh")
        .arg("-i")
        .arg(dir.join("key"))
        .args(["-p", &port.to_string(), "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"])
        .args(["-o", "IdentitiesOnly=yes", "-o"])
        .arg(format!("UserKnownHostsFile={}", known.display()))
        .arg(format!("{USER}@127.0.0.1"))
        .args(command)
        .status()
        .context("starting ssh")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255)))
}

/// Ends the demo's instance, if one runs.
pub fn stop() -> Result<()> {
    let dir = directory()?;
    if let Some(state) = running(&dir)? {
        say("ending the demo's instance");
        kill(Pid::from_raw(state.pid), Signal::SIGTERM)
            .with_context(|| format!("ending process {}", state.pid))?;
        let end = Instant::now() + Duration::from_secs(10);
        while running(&dir)?.is_some() {
            ensure!(Instant::now() < end, "process {} does not end", state.pid);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Starts the demo's cloud and instance, and stays until the instance has ended. When this process
/// dies, so do they.
pub fn hold(dir: &Path) -> Result<()> {
    let _lock = cache::lock(&lock_file(dir), "another demo")?;
    let cloud = Cloud::start(dir)?;
    let user_data = userdata::installing(&dir.join("hostagent.deb"), &cloud)?;
    let public_key = fs::read_to_string(dir.join("key.pub")).context("reading the public key")?;
    cloud.instance(&Instance {
        user_data: Some(user_data),
        public_key: Some(public_key.trim().to_owned()),
        ..Instance::default()
    })?;
    let image = Image::of(DEFAULT_RELEASE)?;
    let disk = dir.join("root.qcow2");
    snapshot::overlay(&image, &disk)?;
    let (ssh, ssh_before) = (free_port()?, free_port()?);
    let mut process = spawn(&Machine {
        forwards: vec![(ssh, 2222), (ssh_before, 22)],
        ..Machine::new(&image, &disk, dir, cloud.ports())
    })?;
    let pid = i32::try_from(std::process::id())?;
    let state = State { pid, ports: cloud.ports(), ssh, ssh_before };
    let unfinished = dir.join("state.unfinished");
    fs::write(&unfinished, serde_json::to_vec(&state)?)?;
    fs::rename(unfinished, state_file(dir))?;
    process.wait().context("waiting for QEMU to end")?;
    Ok(())
}

/// Starts the holder apart from this terminal, and waits for what it has to say.
fn hold_in_background(dir: &Path) -> Result<State> {
    let log = File::create(dir.join("hold.log"))?;
    let mut holder = Command::new("setsid")
        .arg(std::env::current_exe().context("finding this program")?)
        .arg("hold")
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting the demo's holder")?;
    let end = Instant::now() + Duration::from_mins(1);
    loop {
        if let Some(state) = running(dir)? {
            return Ok(state);
        }
        let ended = holder.try_wait()?.is_some();
        if ended || Instant::now() >= end {
            let said = fs::read_to_string(dir.join("hold.log")).unwrap_or_default();
            bail!("the demo's instance did not start: {}", said.trim());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Makes the volume, in the cloud's books and as a disk in the machine.
fn attach(cloud: &Cloud, vm: &mut Vm, dir: &Path) -> Result<()> {
    let volume = Volume { size: 4, ..Volume::new(VOLUME, true) };
    let file = dir.join("volume.raw");
    disk::create(&file, volume.size)?;
    cloud.volume(&volume)?;
    cloud.attach(VOLUME, "/dev/sdf", true)?;
    vm.plug_nvme(&Nvme::new(&file, &volume.serial()))
}

/// What the holder said, if it lives.
fn running(dir: &Path) -> Result<Option<State>> {
    let Ok(lock) = File::open(lock_file(dir)) else { return Ok(None) };
    if lock.try_lock().is_ok() {
        return Ok(None);
    }
    let Ok(text) = fs::read(state_file(dir)) else { return Ok(None) };
    serde_json::from_slice(&text).context("reading the demo's state").map(Some)
}

fn directory() -> Result<PathBuf> {
    Ok(cache::root()?.join("demo"))
}

fn lock_file(dir: &Path) -> PathBuf {
    dir.join("lock")
}

fn state_file(dir: &Path) -> PathBuf {
    dir.join("state.json")
}

/// A port that nobody listens on now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("finding a free port")?;
    Ok(listener.local_addr()?.port())
}

/// Whether an SSH server says its banner on a port; QEMU accepts the connection in any case.
fn answers(port: u16) -> bool {
    let banner = || -> std::io::Result<[u8; 4]> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut banner = [0; 4];
        stream.read_exact(&mut banner)?;
        Ok(banner)
    };
    banner().is_ok_and(|banner| &banner == b"SSH-")
}

/// The serial console, shown while it is written.
struct Console {
    path: PathBuf,
    position: u64,
    rest: String,
}

impl Console {
    fn new(dir: &Path) -> Self {
        Self { path: dir.join(SERIAL_LOG), position: 0, rest: String::new() }
    }

    /// Shows the console until something is true.
    fn until(
        &mut self,
        what: &str,
        deadline: Duration,
        mut done: impl FnMut() -> bool,
    ) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let enough = done();
            self.show();
            if enough {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "waited {} for {what}, in vain; the console's log is {}",
                human(deadline),
                self.path.display()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Shows the lines that were added since the last time.
    fn show(&mut self) {
        let Ok(mut file) = File::open(&self.path) else { return };
        let mut added = Vec::new();
        if file.seek(std::io::SeekFrom::Start(self.position)).is_err()
            || file.read_to_end(&mut added).is_err()
        {
            return;
        }
        self.position += added.len() as u64;
        self.rest.push_str(&String::from_utf8_lossy(&added));
        while let Some(end) = self.rest.find('\n') {
            let line: String = self.rest.drain(..=end).collect();
            if matters(&line) {
                println!("  | {}", line.trim());
            }
        }
    }
}

/// Whether a line of the console is about what the demo shows.
fn matters(line: &str) -> bool {
    let milestones =
        ["Linux version", "hostagent", "running 'init", "running 'modules", "finished at"];
    !line.contains("ci-info") && milestones.iter().any(|word| line.contains(word))
        || (line.contains("nvme") && line.contains("] "))
}

#[cfg(test)]
mod tests {
    use super::matters;

    #[test]
    fn what_matters() {
        assert!(matters("[   61.2] cloud-init[400]: Cloud-init v. 25.1.4 running 'init-local' at"));
        assert!(matters("[   90.0] hostagent[700]: data-volume: pass"));
        assert!(matters("[  101.3] nvme nvme0: pci function 0000:00:06.0"));
        assert!(!matters("[    2.1] ACPI: button: Power Button [PWRF]"));
    }
}

//! A running instance: QEMU as a child process, with its monitor and the guest agent. When the
//! value is dropped, or the lab killed, the instance is gone.

use crate::guest::Guest;
use crate::qemu::{AGENT_SOCKET, Fault, MONITOR_SOCKET, Machine, Nvme, SERIAL_LOG};
use crate::qmp::Qmp;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How long QEMU may take to open its sockets; it restores a snapshot before.
const START: Duration = Duration::from_mins(1);

/// How long a boot may take in software emulation on a busy machine.
pub const BOOT: Duration = Duration::from_mins(10);

/// Where QEMU's complaints go, in the machine's directory.
const ERRORS: &str = "qemu.log";

/// Starts a machine's process, and no more. It dies with the thread that calls this.
pub fn spawn(machine: &Machine) -> Result<Child> {
    let path = machine.dir.join(ERRORS);
    let log = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    let mut command = machine.command();
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().context("starting QEMU")
}

/// One instance.
pub struct Vm {
    /// Absent where another process of the lab holds the machine.
    process: Option<Child>,
    monitor: Qmp,
    dir: PathBuf,
    /// The hands inside.
    pub guest: Guest,
}

impl Vm {
    /// Starts a machine. After a snapshot the guest runs on at once, and its clock is set.
    pub fn start(machine: &Machine) -> Result<Self> {
        let mut process = spawn(machine)?;
        let mut vm = match Self::attach(machine.dir) {
            Ok(vm) => vm,
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                let said = fs::read_to_string(machine.dir.join(ERRORS)).unwrap_or_default();
                return Err(error.context(format!("starting QEMU: {}", said.trim())));
            }
        };
        vm.process = Some(process);
        if machine.snapshot.is_some() {
            vm.guest.wait(START).context("restoring a snapshot")?;
            vm.guest.set_clock()?;
        }
        Ok(vm)
    }

    /// Takes the controls of a machine that another process holds, by its directory.
    pub fn attach(dir: &Path) -> Result<Self> {
        let monitor = Qmp::connect(&dir.join(MONITOR_SOCKET), START)?;
        let guest = Guest::connect(&dir.join(AGENT_SOCKET), START)?;
        Ok(Self { process: None, monitor, dir: dir.to_owned(), guest })
    }

    /// The instance's directory: disks, sockets, logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Plugs an NVMe disk into the running machine: an EBS volume being attached. The serial is
    /// the volume's id without its dash, as on Nitro. The serial also names the device for
    /// [`Vm::unplug`].
    pub fn plug_nvme(&mut self, disk: &Nvme) -> Result<()> {
        if disk.fault == Fault::Hangs {
            let group = json!({ "qom-type": "throttle-group", "id": disk.group() });
            self.monitor.execute("object-add", &group)?;
        }
        self.monitor.execute("blockdev-add", &disk.backend())?;
        self.monitor.execute("device_add", &disk.device()).map(drop)
    }

    /// Plugs a virtio disk into the running machine, with the volume's serial. Unlike QEMU's NVMe
    /// disks, the guest sees it grow ([`Vm::resize`]), as EBS volumes do.
    pub fn plug_virtio(&mut self, file: &Path, serial: &str) -> Result<()> {
        let backing = json!({
            "driver": "raw",
            "node-name": format!("node-{serial}"),
            "file": { "driver": "file", "filename": file },
        });
        self.monitor.execute("blockdev-add", &backing)?;
        let device = json!({
            "driver": "virtio-blk-pci",
            "id": format!("virtio-{serial}"),
            "drive": format!("node-{serial}"),
            "serial": serial,
        });
        self.monitor.execute("device_add", &device).map(drop)
    }

    /// Plugs a network card that leads to one other machine: a cable, whose ends are two machines that
    /// name the same socket. The end that `listens` is plugged first. The guest sees the card by its
    /// hardware address, and has to give it an address.
    pub fn plug_cable(&mut self, socket: &Path, listens: bool, hardware: &str) -> Result<()> {
        let cable = json!({
            "type": "stream",
            "id": "cable",
            "server": listens,
            "addr": { "type": "unix", "path": socket },
        });
        self.monitor.execute("netdev_add", &cable)?;
        let card = json!({
            "driver": "virtio-net-pci",
            "id": "cable-card",
            "netdev": "cable",
            "mac": hardware,
            "romfile": "",
        });
        self.monitor.execute("device_add", &card).map(drop)
    }

    /// Makes a virtio disk larger under the running guest: the volume being modified.
    pub fn resize(&mut self, serial: &str, gibibytes: u32) -> Result<()> {
        let size = u64::from(gibibytes) << 30;
        let change = json!({ "node-name": format!("node-{serial}"), "size": size });
        self.monitor.execute("block_resize", &change).map(drop)
    }

    /// Lets a plugged NVMe disk take this many bytes a second; 0 for as many as come.
    pub fn throttle_writes(&mut self, serial: &str, bytes_per_second: u64) -> Result<()> {
        let limits = json!({
            "id": format!("nvme-{serial}"),
            "bps": 0, "bps_rd": 0, "bps_wr": bytes_per_second,
            "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        self.monitor.execute("block_set_io_throttle", &limits).map(drop)
    }

    /// Pulls a disk out again: the volume being detached.
    pub fn unplug(&mut self, serial: &str) -> Result<()> {
        let id = format!("nvme-{serial}");
        self.monitor.execute("device_del", &json!({ "id": id }))?;
        self.monitor.event("DEVICE_DELETED", Duration::from_secs(30))?;
        let node = json!({ "node-name": format!("node-{serial}") });
        self.monitor.execute("blockdev-del", &node).map(drop)
    }

    /// From now on a disk with [`Fault::Hangs`] answers no request: one byte a second is what it
    /// may read and write.
    pub fn hang(&mut self, disk: &Nvme) -> Result<()> {
        let limits = json!({
            "path": format!("/objects/{}", disk.group()),
            "property": "limits",
            "value": { "bps-total": 1 },
        });
        self.monitor.execute("qom-set", &limits).map(drop)
    }

    /// From now on the root disk is written to a file of its own, with what it held until now
    /// beneath it.
    pub fn divert_root(&mut self, overlay: &Path) -> Result<()> {
        let snapshot = json!({ "device": "root", "snapshot-file": overlay, "format": "qcow2" });
        self.monitor.execute("blockdev-snapshot-sync", &snapshot).map(drop)
    }

    /// Stands the machine still while `look` looks at its disks. What a disk holds then is what
    /// would be left if the power failed at this moment: QEMU has ended the requests that were
    /// under way, and nothing of what the guest had not written out is there.
    pub fn frozen<T>(&mut self, look: impl FnOnce() -> Result<T>) -> Result<T> {
        self.monitor.execute("stop", &json!({}))?;
        let seen = look();
        self.monitor.execute("cont", &json!({}))?;
        seen
    }

    /// Cuts the power and switches it on again: nothing in the guest gets to flush anything.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor.execute("system_reset", &json!({})).map(drop)
    }

    /// Reboots the guest in an orderly way, and waits until its agent answers in the new boot.
    pub fn reboot(&mut self) -> Result<()> {
        let before = self.guest.boot_id()?;
        self.guest.start("systemctl reboot")?;
        self.wait_for_boot_after(&before)
    }

    /// Waits until the agent answers in another boot than the one named.
    pub fn wait_for_boot_after(&mut self, before: &str) -> Result<()> {
        let end = Instant::now() + BOOT;
        loop {
            self.guest.wait(end.saturating_duration_since(Instant::now()))?;
            if self.guest.boot_id().is_ok_and(|id| id != before) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the guest did not reboot within {BOOT:?}");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Presses the power button, and waits until the guest has shut itself down.
    pub fn powerdown(mut self) -> Result<()> {
        self.monitor.execute("system_powerdown", &json!({}))?;
        self.ended(Duration::from_mins(2)).context("shutting the guest down")
    }

    /// Cuts the power for good.
    pub fn kill(self) {
        drop(self);
    }

    /// Saves the machine's state into its disk under a name, drops a state saved there earlier,
    /// and ends the machine.
    pub fn save(mut self, name: &str, replacing: Option<&str>) -> Result<()> {
        self.monitor.execute("stop", &json!({}))?;
        if let Some(old) = replacing {
            self.monitor.human(&format!("delvm {old}"))?;
        }
        self.monitor.human(&format!("savevm {name}"))?;
        self.monitor.execute("quit", &json!({}))?;
        self.ended(Duration::from_mins(1))
    }

    /// Waits until QEMU has ended.
    fn ended(&mut self, deadline: Duration) -> Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let end = Instant::now() + deadline;
        while process.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "QEMU did not end within {deadline:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whether the kernel says on the console that a processor has lost its timer: that happens to
    /// emulated ones, once in many boots, and is for ever.
    pub fn stands_still(&self) -> bool {
        self.serial().contains("kthread timer wakeup didn't happen")
    }

    /// Everything the serial console has shown.
    pub fn serial(&self) -> String {
        let bytes = fs::read(self.dir.join(SERIAL_LOG)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

//! The command line of QEMU: a machine that looks like an EC2 instance on Nitro, as far as QEMU
//! can. A snapshot is only good under the very machine it was taken on, so this file is part of
//! every snapshot's key.

use crate::cloud::Ports;
use crate::host;
use crate::image::Image;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The instance's id, which the kernel reads from the board's asset tag at boot. A snapshot
/// freezes it, so every instance has this one unless it is booted cold with another.
pub const INSTANCE_ID: &str = "i-0123456789abcdef0";

/// The volume id of the root disk, without its dash: a virtio disk's serial has 20 characters.
pub const ROOT_SERIAL: &str = "vol0aaaaaaaaaaaaaaa0";

/// The instance type, which Nitro shows as the product's name.
pub const INSTANCE_TYPE: &str = "m6i.large";

/// Begins with `ec2`: that is how cloud-init knows where it is.
const UUID: &str = "ec2a1b2c-3d4e-4f50-8a6b-7c8d9e0f1a2b";

/// Where the guest reaches the simulated AWS APIs; the metadata service has its true address.
const API_ADDRESS: &str = "169.254.169.5";

/// Everything that differs from one start of a machine to another.
pub struct Machine<'a> {
    /// The kernel and initial file system to boot.
    pub image: &'a Image,
    /// The root disk, and snapshot, as qcow2.
    pub disk: &'a Path,
    /// Where the sockets and the serial log are made.
    pub dir: &'a Path,
    /// The simulated cloud's ports on this machine.
    pub ports: Ports,
    /// The snapshot to continue from.
    pub snapshot: Option<&'a str>,
    /// The instance id that DMI shows; matters for a cold boot only.
    pub instance_id: &'a str,
    /// Ports of this machine's loopback that lead into the guest: (here, there).
    pub forwards: Vec<(u16, u16)>,
    /// The NVMe disks that are there from the start, in the order of their PCI slots. A machine
    /// that has some cannot be saved.
    pub disks: Vec<Nvme>,
    /// More of the kernel's command line, for a cold boot.
    pub parameters: &'a str,
}

impl<'a> Machine<'a> {
    /// The usual machine, booted cold.
    pub fn new(image: &'a Image, disk: &'a Path, dir: &'a Path, ports: Ports) -> Self {
        Self {
            image,
            disk,
            dir,
            ports,
            snapshot: None,
            instance_id: INSTANCE_ID,
            forwards: Vec::new(),
            disks: Vec::new(),
            parameters: "",
        }
    }

    /// The command that starts the machine. QEMU dies with the thread that starts it: nothing
    /// stays behind when the lab is killed.
    pub fn command(&self) -> Command {
        let path = |name: &str| self.dir.join(name).display().to_string();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "pc", "-smp", "2", "-m", "2048", "-cpu", cpu()]);
        command.args(["-accel", accelerator(), "-device", "virtio-rng-pci"]);
        command.args(["-kernel", &self.image.kernel().display().to_string()]);
        command.args(["-initrd", &self.image.initrd().display().to_string()]);
        // An emulated processor has no secrets to leak, and pays for each mitigation and each page
        // that is cleared twice.
        let parameters = format!(
            "root=/dev/vda ro console=ttyS0 mitigations=off init_on_alloc=0 {}",
            self.parameters
        );
        command.args(["-append", parameters.trim_end()]);
        command.args([
            "-smbios",
            &format!(
                "type=1,manufacturer=Amazon EC2,product={INSTANCE_TYPE},serial={UUID},uuid={UUID}"
            ),
        ]);
        let tag = self.instance_id;
        command.args(["-smbios", &format!("type=2,manufacturer=Amazon EC2,asset={tag}")]);
        let disk = self.disk.display();
        command.args(["-drive", &format!("file={disk},if=none,id=root,format=qcow2")]);
        command.args(["-device", &format!("virtio-blk-pci,drive=root,serial={ROOT_SERIAL}")]);
        command.args(["-netdev", &self.network()]);
        command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
        command.args(["-device", "virtio-serial-pci"]);
        let agent = format!("socket,id=agent,path={},server=on,wait=off", path(AGENT_SOCKET));
        command.args(["-chardev", &agent]);
        command.args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        command.args(["-chardev", &format!("file,id=serial,path={},append=on", path(SERIAL_LOG))]);
        command.args(["-serial", "chardev:serial"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path(MONITOR_SOCKET))]);
        for disk in &self.disks {
            command.args(["-blockdev", &disk.backend().to_string()]);
            command.args(["-device", &disk.device().to_string()]);
        }
        if let Some(snapshot) = self.snapshot {
            command.args(["-loadvm", snapshot]);
        }
        command
    }

    /// A network in which the metadata service has its true address. Each connection to one of the
    /// two guest addresses gets a process of its own, so keep-alive and parallel requests work.
    fn network(&self) -> String {
        use std::fmt::Write as _;
        let mut network = "user,id=net,net=169.254.169.0/24,host=169.254.169.2,dns=169.254.169.3,\
                           dhcpstart=169.254.169.15"
            .to_owned();
        for (address, port) in [("169.254.169.254", self.ports.imds), (API_ADDRESS, self.ports.api)]
        {
            let _ = write!(network, ",guestfwd=tcp:{address}:80-cmd:socat - TCP:127.0.0.1:{port}");
        }
        for (here, there) in &self.forwards {
            let _ = write!(network, ",hostfwd=tcp:127.0.0.1:{here}-:{there}");
        }
        network
    }
}

/// An NVMe disk: an EBS volume as an instance on Nitro sees it.
#[derive(Debug, Clone)]
pub struct Nvme {
    /// The raw file that holds its content.
    pub file: PathBuf,
    /// Its serial number: the volume's id without its dash. It also names the device in QEMU.
    pub serial: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Reads that touch this sector of 512 bytes fail; without one, all reads do.
    Read(Option<u64>),
    /// All writes of data fail; QEMU knows a write of zeros by another name, and lets it through.
    Write,
    /// The disk takes writes, and fails to flush them.
    Flush,
    /// It can be made to answer no more, by [`crate::vm::Vm::hang`]; only for a disk plugged later.
    Hangs,
}

impl Nvme {
    /// A disk in order.
    pub fn new(file: &Path, serial: &str) -> Self {
        Self { file: file.to_owned(), serial: serial.to_owned(), fault: Fault::None }
    }

    /// The block device in QEMU, for `-blockdev` and `blockdev-add`. Errors are injected between
    /// the image format and the file: that is what `blkdebug` is for.
    pub fn backend(&self) -> Value {
        let file = json!({ "driver": "file", "filename": self.file });
        let inject = |kind: &str, sector: Option<u64>| {
            let mut rule = json!({ "event": "none", "iotype": kind, "errno": EIO });
            if let Some(sector) = sector {
                rule["sector"] = sector.into();
            }
            json!({ "driver": "blkdebug", "image": file, "inject-error": [rule] })
        };
        let file = match self.fault {
            Fault::None => file,
            Fault::Read(sector) => inject("read", sector),
            Fault::Write => inject("write", None),
            Fault::Flush => inject("flush", None),
            Fault::Hangs => {
                json!({ "driver": "throttle", "throttle-group": self.group(), "file": file })
            }
        };
        json!({ "driver": "raw", "node-name": self.node(), "file": file })
    }

    /// The device in QEMU, for `-device` and `device_add`.
    pub fn device(&self) -> Value {
        json!({
            "driver": "nvme",
            "id": format!("nvme-{}", self.serial),
            "drive": self.node(),
            "serial": self.serial,
        })
    }

    /// The name of its block device in QEMU.
    pub fn node(&self) -> String {
        format!("node-{}", self.serial)
    }

    /// The name of what limits a disk with [`Fault::Hangs`].
    pub fn group(&self) -> String {
        format!("limit-{}", self.serial)
    }
}

/// Linux's number for an I/O error.
const EIO: u32 = 5;

/// The monitor's socket in a machine's directory.
pub const MONITOR_SOCKET: &str = "qmp.sock";

/// The guest agent's socket in a machine's directory.
pub const AGENT_SOCKET: &str = "agent.sock";

/// The serial console's log in a machine's directory.
pub const SERIAL_LOG: &str = "serial.log";

/// What a snapshot depends on besides its disk.
pub fn fingerprint() -> anyhow::Result<String> {
    let processor = if host::has_kvm() { host::processor() } else { String::new() };
    Ok([&host::qemu_version()?, accelerator(), &processor, include_str!("qemu.rs")].join("\n"))
}

fn accelerator() -> &'static str {
    if host::has_kvm() { "kvm" } else { "tcg,thread=multi" }
}

/// Without virtualisation of its own: the guest would load modules for it.
fn cpu() -> &'static str {
    if host::has_kvm() { "host,migratable=on,svm=off,vmx=off" } else { "max,svm=off,vmx=off" }
}

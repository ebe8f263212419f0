//! Snapshots of running instances, so that a scenario starts in a second. The first, `booted`, is
//! an instance right after its first boot: cloud-init done, Docker running, nothing of ours in it.
//! The second, `installed`, is the same with our package installed and nothing started.

use crate::cache::{self, Key};
use crate::cloud::{Cloud, FILES_URL, Instance};
use crate::command::{run, tail};
use crate::guest::Script;
use crate::image::{DEFAULT_RELEASE, Image};
use crate::progress::Step;
use crate::qemu::{self, Machine};
use crate::vm::{BOOT, Vm};
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Changes whenever this file makes something else of the same image.
const RECIPE: &str = "2";

/// Where the image's operator says how sshd is to be.
pub const SSHD_FRAGMENT: &str = "/etc/ssh/sshd_config.d/50-image.conf";

/// What it says: an image whose operator takes care of it, so that not every scenario waits for
/// hostagent to do so. Where that is what is tested, the scenario removes it.
const HARDENED: &str = "PasswordAuthentication no\nX11Forwarding no\nAllowAgentForwarding no\n\
    MaxAuthTries 4\nClientAliveInterval 300\nMACs -*md5*,*sha1*,*ripemd*,umac-64*,*-96*\n";

/// A saved instance in the cache.
#[derive(Debug, Clone)]
pub struct Snapshot {
    dir: PathBuf,
    /// The name under which QEMU finds the state in the disk.
    pub name: &'static str,
}

impl Snapshot {
    /// The instance after its first boot.
    pub fn booted(image: &Image) -> Result<Self> {
        let dir =
            cache::entry(&kind("booted", image), &booted_key(image)?, |dir| boot(image, dir))?;
        Ok(Self { dir, name: "booted" })
    }

    /// The instance with a package of ours installed.
    pub fn installed(image: &Image, package: &Path) -> Result<Self> {
        let booted = Self::booted(image)?;
        let key = booted_key(image)?.with(HARDENED).with_file(package)?;
        let dir = cache::entry(&kind("installed", image), &key, |dir| {
            install(image, &booted, package, dir)
        })?;
        Ok(Self { dir, name: "installed" })
    }

    /// Copies the disk with the state in it.
    pub fn copy_to(&self, disk: &Path) -> Result<()> {
        cache::copy_disk(&self.dir.join("disk.qcow2"), disk)
    }
}

/// Where the snapshots of a name are in the cache.
fn kind(name: &str, image: &Image) -> String {
    match image.release() {
        DEFAULT_RELEASE => format!("snapshots/{name}"),
        other => format!("snapshots/{name}-{other}"),
    }
}

fn booted_key(image: &Image) -> Result<Key> {
    Ok(Key::new().with(RECIPE).with(image.id()?).with(qemu::fingerprint()?))
}

/// Makes an empty overlay on the image's disk.
pub fn overlay(image: &Image, disk: &Path) -> Result<()> {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&image.disk(), disk]))
    .map(drop)
}

/// Boots an instance for the first time and saves it when it has come to rest.
fn boot(image: &Image, dir: &Path) -> Result<()> {
    crate::cloud::python()?;
    let step = Step::begin(format!(
        "booting an instance for the first time, Debian {} (two minutes in emulation)",
        image.release()
    ));
    let work = tempfile::tempdir()?;
    let disk = dir.join("disk.qcow2");
    overlay(image, &disk)?;
    let cloud = Cloud::start(work.path())?;
    cloud.instance(&Instance::default())?;
    let mut vm = Vm::start(&Machine::new(image, &disk, work.path(), cloud.ports()))?;
    if let Err(error) = settle(&mut vm).and_then(|()| slim(&mut vm)) {
        return Err(error.context(format!(
            "the first boot; the serial console ends with\n{}",
            tail(&vm.serial(), 40)
        )));
    }
    vm.save("booted", None).context("saving the booted instance")?;
    step.done();
    Ok(())
}

/// Waits until cloud-init is done and the boot is finished.
pub fn booted(vm: &mut Vm) -> Result<()> {
    vm.guest.wait(BOOT)?;
    let patient = |text| Script::new(text).deadline(BOOT);
    // Status 2: done, with a warning that cloud-init gives for every EC2 without network metadata.
    vm.guest.succeed(&patient("cloud-init status --wait --long; [ $? != 1 ]"))?;
    vm.guest.succeed(&patient("systemctl is-system-running --wait || systemctl --failed")).map(drop)
}

/// Waits until an instance has finished its boot and has nothing more to do.
pub fn settle(vm: &mut Vm) -> Result<()> {
    booted(vm)?;
    vm.guest.sh("systemctl is-active docker.service containerd.service ssh.service")?;
    let end = Instant::now() + Duration::from_mins(2);
    // Both processors idle for nine tenths of a second and more.
    let idle = "idle() { awk '/^cpu /{print $5}' /proc/stat; }; a=$(idle); sleep 1; b=$(idle); \
                echo $((b - a))";
    while vm.guest.sh(idle)?.trim().parse::<u32>().unwrap_or(0) < 180 {
        ensure!(Instant::now() < end, "the instance does not come to rest within two minutes");
    }
    Ok(())
}

/// Makes the saved state small, for it is copied and read by every scenario: the page cache goes,
/// and free memory is overwritten with zeros, which take no space.
fn slim(vm: &mut Vm) -> Result<()> {
    vm.guest
        .succeed(
            &Script::new(
                "set -e; sync; echo 3 >/proc/sys/vm/drop_caches
                 free=$(awk '/^MemFree/{print $2}' /proc/meminfo)
                 mount -t tmpfs -o size=100% none /mnt
                 head -c $((free - 100000))k /dev/zero >/mnt/zeros
                 umount /mnt",
            )
            .deadline(Duration::from_mins(4)),
        )
        .map(drop)
}

/// Installs our package in a booted instance and saves that.
fn install(image: &Image, booted: &Snapshot, package: &Path, dir: &Path) -> Result<()> {
    let step =
        Step::begin(format!("installing the package in an instance, Debian {}", image.release()));
    let work = tempfile::tempdir()?;
    let disk = dir.join("disk.qcow2");
    booted.copy_to(&disk)?;
    let cloud = Cloud::start(work.path())?;
    cloud.instance(&Instance::default())?;
    let content =
        std::fs::read(package).with_context(|| format!("reading {}", package.display()))?;
    cloud.put_file("hostagent.deb", &content)?;
    let mut vm = Vm::start(&Machine {
        snapshot: Some(booted.name),
        ..Machine::new(image, &disk, work.path(), cloud.ports())
    })?;
    let script = format!(
        "set -e; cd /tmp; curl -sSf -o hostagent.deb {FILES_URL}/hostagent.deb; \
         DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
         ./hostagent.deb; rm hostagent.deb"
    );
    vm.guest.succeed(&Script::new(&script).deadline(Duration::from_mins(5)))?;
    vm.guest.write(SSHD_FRAGMENT, HARDENED.as_bytes())?;
    slim(&mut vm)?;
    vm.save("installed", Some(booted.name)).context("saving the instance with our package")?;
    step.done();
    Ok(())
}

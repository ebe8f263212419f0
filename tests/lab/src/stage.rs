//! What a scenario plays on: one simulated cloud, one instance in it, and the disks, in a work
//! directory of its own. When the scenario ends, all of it is gone.

use crate::cloud::{Cloud, Instance, Volume};
use crate::command::tail;
use crate::disk;
use crate::guest::{Guest, Script};
use crate::image::Image;
use crate::qemu::{Fault, INSTANCE_ID, Machine, Nvme};
use crate::snapshot::{self, Snapshot};
use crate::vm::{BOOT, Vm};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The root disk's overlay in the work directory.
const ROOT_DISK: &str = "root.qcow2";

/// The kernel parameters of a brief boot: the kernel, systemd, udev, networkd, sshd, Docker and our
/// units are as always. cloud-init, which alone takes half of a boot in emulation, does not look
/// again at what the first boot has settled, and what no instance here uses is left out.
pub const BRIEF: &str = "quiet \
    systemd.mask=cloud-init-local.service systemd.mask=cloud-init.service \
    systemd.mask=cloud-init-main.service systemd.mask=cloud-init-network.service \
    systemd.mask=cloud-config.service systemd.mask=cloud-final.service \
    systemd.mask=serial-getty@ttyS0.service systemd.mask=getty@tty1.service \
    systemd.mask=dev-hugepages.mount systemd.mask=dev-mqueue.mount \
    systemd.mask=sys-kernel-debug.mount systemd.mask=sys-kernel-tracing.mount \
    systemd.mask=sys-kernel-config.mount systemd.mask=sys-fs-fuse-connections.mount \
    systemd.mask=modprobe@drm.service systemd.mask=modprobe@fuse.service \
    systemd.mask=modprobe@configfs.service systemd.mask=modprobe@efi_pstore.service \
    module_blacklist=ata_piix,ata_generic,libata,scsi_mod,button,evdev,psmouse,serio_raw,i2c_piix4,\
pcspkr,floppy,qemu_fw_cfg,aesni_intel,ghash_clmulni_intel,sha512_ssse3,sha256_ssse3,sha1_ssse3";

/// The state an instance starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Nothing runs yet: the scenario boots the instance itself, with [`Stage::boot`].
    Cold,
    /// After the first boot, without our package.
    Booted,
    /// After the first boot, with our package installed and nothing of it started.
    Installed,
}

/// What scenarios are made from: the image, and the package under test.
pub struct Props {
    /// The guest image.
    pub image: Image,
    /// The .deb under test; absent when no scenario needs it.
    pub package: Option<PathBuf>,
    /// The power cuts that are made where there are some.
    pub cuts: Cuts,
}

/// How many power cuts are made, and at which moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cuts {
    /// How many.
    pub times: usize,
    /// Draws the first moment; the next seed draws the next.
    pub seed: u64,
}

impl Props {
    /// The package under test.
    pub fn package(&self) -> Result<&Path> {
        self.package.as_deref().context("this scenario needs the package, which was not built")
    }
}

/// One scenario's cloud, instance and disks.
pub struct Stage<'a> {
    /// What it is made from.
    pub props: &'a Props,
    /// What surrounds the instance.
    pub cloud: Cloud,
    dir: PathBuf,
    vm: Option<Vm>,
    begun: Instant,
}

impl<'a> Stage<'a> {
    /// Sets the stage in an empty directory.
    pub fn set(props: &'a Props, dir: &Path, start: Start) -> Result<Self> {
        let cloud = Cloud::start(dir)?;
        let snapshot = match start {
            Start::Cold => None,
            Start::Booted => Some(Snapshot::booted(&props.image)?),
            Start::Installed => Some(Snapshot::installed(&props.image, props.package()?)?),
        };
        let disk = dir.join(ROOT_DISK);
        let mut vm = None;
        // The cloud takes a second or two for its first request, and so does a restored instance.
        std::thread::scope(|scope| {
            let first = scope.spawn(|| cloud.instance(&Instance::default()));
            if let Some(snapshot) = snapshot {
                snapshot.copy_to(&disk)?;
                vm = Some(Vm::start(&Machine {
                    snapshot: Some(snapshot.name),
                    ..Machine::new(&props.image, &disk, dir, cloud.ports())
                })?);
            }
            first.join().unwrap_or_else(|_| bail!("the cloud's first request panicked"))
        })?;
        Ok(Self { props, cloud, dir: dir.to_owned(), vm, begun: Instant::now() })
    }

    /// The work directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The running instance.
    pub fn vm(&mut self) -> Result<&mut Vm> {
        self.vm.as_mut().context("no instance runs on this stage")
    }

    /// The hands inside the running instance.
    pub fn guest(&mut self) -> Result<&mut Guest> {
        Ok(&mut self.vm()?.guest)
    }

    /// The root disk's overlay: everything that the instance ever wrote to its root disk.
    pub fn root_disk(&self) -> PathBuf {
        self.dir.join(ROOT_DISK)
    }

    /// Boots an instance for the first time, from the image's untouched root disk.
    pub fn boot(&mut self, instance: &Instance) -> Result<()> {
        self.cloud.instance(instance)?;
        snapshot::overlay(&self.props.image, &self.root_disk())?;
        self.power_on(&instance.id, &[], false)
    }

    /// Cuts the power, and boots again from the same root disk. NVMe disks have to be plugged
    /// again: after a stop and a start they may be others.
    pub fn power_cycle(&mut self) -> Result<()> {
        drop(self.vm.take());
        self.power_on(INSTANCE_ID, &[], false)
    }

    /// As [`Stage::power_cycle`], but with these disks from the start, in the order of their PCI
    /// slots; what boots may be another instance, whose root disk comes from an image that was made
    /// of this one. The boot is a [`BRIEF`] one, which this waits for.
    pub fn power_cycle_with(&mut self, instance_id: &str, disks: &[&Volume]) -> Result<()> {
        drop(self.vm.take());
        self.power_on(instance_id, disks, true)?;
        self.guest()?.wait(BOOT)
    }

    /// Saves the running instance in its root disk under a name, instead of what was saved there,
    /// and ends it.
    pub fn save(&mut self, name: &str, replacing: &str) -> Result<()> {
        let vm = self.vm.take().context("no instance runs on this stage")?;
        vm.save(name, Some(replacing))
    }

    /// Makes a volume's disk, tells the cloud about the volume and that it is attached, and plugs
    /// the disk. Returns the disk's path.
    pub fn attach(&mut self, volume: &Volume, device: &str) -> Result<PathBuf> {
        self.announce(volume, device)?;
        self.plug(volume)
    }

    /// Tells the cloud about a volume and that it is attached; no disk is plugged.
    pub fn announce(&self, volume: &Volume, device: &str) -> Result<()> {
        self.cloud.volume(volume)?;
        self.cloud.attach(&volume.id, device, true)
    }

    /// Plugs a volume's disk, made empty if it does not exist; the cloud is told nothing.
    pub fn plug(&mut self, volume: &Volume) -> Result<PathBuf> {
        self.plug_with(volume, Fault::None)
    }

    /// As [`Stage::plug`], with something wrong with the disk.
    pub fn plug_with(&mut self, volume: &Volume, fault: Fault) -> Result<PathBuf> {
        let disk = Nvme { fault, ..self.disk_of(volume) };
        if !disk.file.exists() {
            disk::create(&disk.file, volume.size)?;
        }
        self.vm()?.plug_nvme(&disk)?;
        Ok(disk.file)
    }

    /// The disk of a volume, whether or not it is plugged.
    pub fn disk_of(&self, volume: &Volume) -> Nvme {
        Nvme::new(&self.dir.join(format!("{}.raw", volume.id)), &volume.serial())
    }

    /// Everything that helps to find out why a scenario failed.
    pub fn evidence(&mut self) -> String {
        let begun = self.begun;
        let journal = self.guest().and_then(|guest| {
            guest.wait(Duration::from_secs(10))?;
            // What the snapshot brought along says nothing about this scenario.
            let since = begun.elapsed().as_secs() + 30;
            guest.run(&Script::new(&format!(
                "journalctl -b --no-pager -o short-precise --since -{since}s | tail -n 300"
            )))
        });
        let journal = match journal {
            Ok(ended) => ended.stdout,
            Err(error) => format!("not available: {error:#}"),
        };
        let calls = match self.cloud.calls() {
            Ok(calls) => calls.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
            Err(error) => format!("not available: {error:#}"),
        };
        let serial = self.vm.as_ref().map(Vm::serial).unwrap_or_default();
        format!(
            "--- the guest's journal\n{}\n--- the serial console's last lines\n{}\n\
             --- the calls to AWS\n{}",
            journal.trim_end(),
            tail(&serial, 30),
            calls.trim_end(),
        )
    }

    /// Boots what is on the root disk.
    fn power_on(&mut self, instance_id: &str, disks: &[&Volume], brief: bool) -> Result<()> {
        self.vm = Some(Vm::start(&Machine {
            instance_id,
            disks: disks.iter().map(|volume| self.disk_of(volume)).collect(),
            parameters: if brief { BRIEF } else { "" },
            ..Machine::new(&self.props.image, &self.root_disk(), &self.dir, self.cloud.ports())
        })?);
        Ok(())
    }
}

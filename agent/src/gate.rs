//! The gate: whether Docker's storage is where it must be, by what this machine alone can tell.
//!
//! systemd runs it before every start of Docker and containerd. It starts no program and uses no
//! network. EC2's word that the volume is encrypted is taken from [`crate::aws::cache`]: encryption
//! cannot change in a volume's life, and the serial number of the disk that is mounted proves which
//! volume it is.

use std::path::Path;

use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, Result, bail, ensure};

use crate::aws::cache::{self, Confirmation};
use crate::config::Volume;
use crate::host::block::{DevNum, Disk, ToldBy, VolumeId, Volumes};
use crate::host::chain::{Kind, Layer};
use crate::host::device;
use crate::host::docker_config::{self, Moved};
use crate::host::identity::{self, Firmware};
use crate::host::inner_links::{InnerLink, inner_links};
use crate::host::mounts::{self, Mount, Overlay};

/// Docker's storage directories, and the directories on the data volume that are mounted on them.
pub const STORAGE: [(&str, &str); 2] =
    [("/var/lib/docker", "docker"), ("/var/lib/containerd", "containerd")];

/// What the gate looks at.
struct Facts {
    confirmation: Option<Confirmation>,
    firmware: Firmware,
    /// All mounts.
    mounts: Vec<Mount>,
    /// All overlays among them, with what is written to them.
    overlays: Vec<Overlay>,
    /// This boot.
    boot_id: String,
    /// The device of the last mount on the mount point, down to its disks; none without a device.
    device: Option<Layer>,
    /// The UUID of the filesystem that this device carries; read where a disk has no serial number.
    filesystem: Option<uuid::Uuid>,
    /// The device that is seen at the mount point and at the storage directories, whatever the list
    /// of mounts says: a later mount on a parent hides them. None where nothing is seen.
    seen: Vec<(String, Option<DevNum>)>,
    /// The storage that the daemons' configuration moves away from these.
    moved: Vec<Moved>,
    /// The links inside of all of it.
    links: Vec<InnerLink>,
}

/// Filesystems that hold nothing of their own: what Docker mounts below its storage. What is written to
/// an overlay is in a directory elsewhere, which is looked at besides.
pub const NOT_ON_DISK: [&str; 3] = ["overlay", "tmpfs", "nsfs"];

/// Looks, and says in one sentence why Docker may start, or fails with why it may not.
pub fn check(volume: &Volume) -> Result<String> {
    let mount_point = volume.mount_point.path();
    let mounts = mounts::all()?;
    let device = match mounts.iter().rfind(|m| Path::new(&m.mount_point) == mount_point) {
        Some(mount) if mount.device.major != 0 => Some(Layer::of(mount.device)?),
        _ => None,
    };
    let filesystem = match &device {
        Some(layer) if by_mapping(layer) => device::filesystem_of(layer)?.map(|found| found.uuid),
        _ => None,
    };
    let mut seen = Vec::new();
    for path in [mount_point].into_iter().chain(STORAGE.map(|(path, _)| Path::new(path))) {
        match std::fs::metadata(path) {
            Ok(meta) => seen.push((path.display().to_string(), Some(DevNum::of(meta.dev())))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                seen.push((path.display().to_string(), None));
            }
            Err(e) => return Err(e).with_context(|| format!("looking at {}", path.display())),
        }
    }
    let moved = docker_config::moved()?;
    let mut links = Vec::new();
    let places = moved.iter().filter_map(|moved| moved.place.as_deref());
    for top in STORAGE.map(|(path, _)| Path::new(path)).into_iter().chain(places) {
        links.extend(inner_links(top)?);
    }
    let facts = Facts {
        confirmation: cache::read().context("reading which volume EC2 confirmed")?,
        firmware: identity::firmware()?,
        mounts,
        overlays: mounts::overlays()?,
        boot_id: identity::boot_id()?,
        device,
        filesystem,
        seen,
        moved,
        links,
    };
    judge(volume, &facts)
}

fn judge(wanted: &Volume, facts: &Facts) -> Result<String> {
    let place = wanted.mount_point.as_str();
    let Some(confirmation) = &facts.confirmation else {
        bail!(
            "EC2 has not confirmed an encrypted volume for this instance; run `hostagent provision`"
        );
    };
    if let Some(boot_id) = &confirmation.boot_id {
        ensure!(
            *boot_id == facts.boot_id,
            "EC2 confirmed the volume in an earlier boot, and on this instance a disk does not tell \
             which volume it is; run `hostagent provision`"
        );
    } else {
        let Some(instance_id) = &facts.firmware.instance_id else {
            bail!("the firmware does not tell which instance this is");
        };
        ensure!(
            *instance_id == confirmation.instance_id,
            "the confirmed volume belongs to {}, and this is {instance_id}; run `hostagent provision`",
            confirmation.instance_id
        );
    }
    for volume in &confirmation.volumes {
        ensure!(
            wanted.accepts_key(volume.kms_key_id.as_deref()),
            "the key of {} is not one of volume.kms_keys",
            volume.volume_id
        );
    }
    let volume = confirmation.ids();
    let device = the_one(&facts.mounts, place, "/")?;
    let layer =
        facts.device.as_ref().with_context(|| format!("{place} is not mounted from a device"))?;
    ensure!(layer.number == device, "{place} changed while it was looked at");
    // Without the operator's word that something stands on the volume, its own disk is meant.
    ensure!(
        matches!(layer.kind, Kind::Disk(_)) || wanted.assembled.is_some(),
        "{place} is mounted from {}, which is not the volume's own disk",
        layer.name
    );
    let mut beneath = Vec::new();
    for disk in layer.disks().with_context(|| format!("looking at what {place} stands on"))? {
        beneath.push(
            confirmed_disk(confirmation, disk)
                .with_context(|| format!("{place} is not where it was"))?,
        );
    }
    beneath.sort();
    ensure!(
        beneath == volume.ids(),
        "{place} does not stand on all of {volume}, which EC2 confirmed"
    );
    // On Xen another volume can have got the name since, even in this boot.
    ensure!(
        !by_mapping(layer) || facts.filesystem == Some(volume.filesystem_uuid()),
        "{place} is mounted from {}, and that is not the filesystem that hostagent made on {volume}",
        layer.name
    );
    for (path, directory) in STORAGE {
        let there = the_one(&facts.mounts, path, &format!("/{directory}"))?;
        ensure!(there == device, "{path} is on the device {there}, not on {volume} ({device})");
    }
    for (path, there) in &facts.seen {
        // That it is mounted is known by now.
        let Some(there) = there else { bail!("a mount hides {path}: nothing is seen there") };
        ensure!(
            *there == device,
            "a mount hides {path}: what is seen there is on the device {there}"
        );
    }
    for Moved { setting, place: there, device: number } in &facts.moved {
        // Below the mount point, which the daemons wait for: the volume may be mounted elsewhere too.
        let on_volume = *number == Some(device)
            && there.as_ref().is_some_and(|there| there.starts_with(wanted.mount_point.path()));
        ensure!(
            on_volume,
            "{setting}, which is not on {volume} as it is mounted on {place} ({}); choose a \
             directory below {place}, or remove the setting: hostagent puts the default \
             directories on the volume",
            number.map_or("it leads nowhere".to_owned(), |number| format!("device {number}"))
        );
    }
    nothing_leads_off(wanted, &volume, device, facts)?;
    Ok(format!("Docker's storage is on {volume}"))
}

/// Fails for what, inside of the storage, is mounted from elsewhere, writes elsewhere or leads elsewhere.
fn nothing_leads_off(
    wanted: &Volume,
    volume: &Volumes,
    device: DevNum,
    facts: &Facts,
) -> Result<()> {
    let place = wanted.mount_point.as_str();
    if let Some(stray) = stray_mount(wanted, device, facts) {
        bail!(
            "{} is mounted from the device {}, not from {volume}",
            stray.mount_point,
            stray.device
        );
    }
    if let Some(Overlay { mount_point, upper, .. }) = stray_overlay(wanted, device, facts) {
        bail!(
            "what is written to the overlay on {} is kept in {}, which is not on {volume}",
            mount_point.display(),
            upper.as_deref().unwrap_or(Path::new("nothing")).display()
        );
    }
    if let Some(link) = facts.links.iter().find(|link| leads_off(wanted, device, link)) {
        bail!(
            "{path} is a link to {}, which is not on {volume} as it is mounted on {place} ({}); put \
             what Docker has there in the place of the link, or remove the link",
            link.target.display(),
            link.leads
                .as_ref()
                .map_or("it leads nowhere".to_owned(), |(_, number)| format!("device {number}")),
            path = link.path.display()
        );
    }
    Ok(())
}

/// Whether no serial number tells which volume some disk beneath is.
fn by_mapping(layer: &Layer) -> bool {
    layer.ends().iter().flatten().any(|disk| matches!(disk.told_by, ToldBy::Mapping(_)))
}

/// Whether a link inside of Docker's storage leads to where nobody sees to it that it is the volume.
fn leads_off(wanted: &Volume, device: DevNum, link: &InnerLink) -> bool {
    let Some((there, number)) = &link.leads else { return true };
    let tops = STORAGE.map(|(path, _)| Path::new(path));
    let inside = |top: &Path| there.starts_with(top);
    *number != device || !(inside(wanted.mount_point.path()) || tops.into_iter().any(inside))
}

/// The confirmed volume that a disk is.
fn confirmed_disk(confirmation: &Confirmation, disk: &Disk) -> Result<VolumeId> {
    let is = |volume: &&cache::Confirmed| match &disk.told_by {
        ToldBy::Serial => disk.volume_id().as_ref() == Some(&volume.volume_id),
        // In the boot in which it was confirmed, which was checked before; and by the filesystem on
        // it, which is checked then.
        ToldBy::Mapping(_) => {
            confirmation.boot_id.is_some() && volume.disk.as_ref() == Some(&disk.name)
        }
    };
    if let Some(volume) = confirmation.volumes.iter().find(is) {
        return Ok(volume.volume_id.clone());
    }
    match disk.volume_id() {
        Some(id) => bail!("it is on {id}, and EC2 confirmed {}", confirmation.ids()),
        None => bail!("it is on {}, which is no EBS volume", disk.name),
    }
}

/// Whether a path is inside of Docker's storage, wherever that is seen.
fn is_inside(wanted: &Volume, facts: &Facts, path: &Path) -> bool {
    let storage = STORAGE.iter().flat_map(|(path, directory)| {
        [Path::new(path).to_path_buf(), wanted.mount_point.path().join(directory)]
    });
    let moved = facts.moved.iter().filter_map(|moved| moved.place.clone());
    storage.chain(moved).any(|top| path.starts_with(&top) && path != top)
}

/// A mount below Docker's storage through which data would leave the volume.
fn stray_mount<'a>(wanted: &Volume, device: DevNum, facts: &'a Facts) -> Option<&'a Mount> {
    facts.mounts.iter().find(|mount| {
        is_inside(wanted, facts, Path::new(&mount.mount_point))
            && mount.device != device
            && !NOT_ON_DISK.contains(&mount.fs_type.as_str())
    })
}

/// An overlay below Docker's storage through which data would leave the volume.
fn stray_overlay<'a>(wanted: &Volume, device: DevNum, facts: &'a Facts) -> Option<&'a Overlay> {
    facts.overlays.iter().find(|overlay| {
        is_inside(wanted, facts, &overlay.mount_point)
            && overlay.upper.is_some()
            && overlay.device != Some(device)
    })
}

/// The device of the one mount at a path, which must show the directory `root` of its filesystem.
fn the_one(mounts: &[Mount], path: &str, root: &str) -> Result<DevNum> {
    let here: Vec<&Mount> = mounts.iter().filter(|m| m.mount_point == path).collect();
    match here[..] {
        [mount] if mount.root == root => Ok(mount.device),
        [mount] => bail!("{path} shows the directory {} of its filesystem, not {root}", mount.root),
        [] => bail!("nothing is mounted on {path}"),
        _ => bail!("{} mounts are stacked on {path}", here.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::device::DataDevice;
    use jiff::Timestamp;

    const DATA: DevNum = DevNum { major: 259, minor: 1 };
    const ROOT: DevNum = DevNum { major: 254, minor: 1 };

    fn mount(path: &str, device: DevNum, root: &str) -> Mount {
        Mount {
            device,
            root: root.into(),
            mount_point: path.into(),
            fs_type: "ext4".into(),
            options: vec![],
            read_only: false,
        }
    }

    fn volume_id() -> VolumeId {
        VolumeId::parse("vol-0123456789abcdef0").unwrap()
    }

    fn disk() -> Disk {
        Disk {
            name: "nvme1n1".into(),
            number: DATA,
            serial: Some("vol0123456789abcdef0".into()),
            model: None,
            size: 8 << 30,
            told_by: ToldBy::Serial,
            sequence: None,
        }
    }

    /// Puts another disk beneath the mount.
    fn beneath(facts: &mut Facts, change: impl FnOnce(&mut Disk)) {
        let mut disk = disk();
        change(&mut disk);
        facts.device.as_mut().unwrap().kind = Kind::Disk(disk);
    }

    fn good() -> Facts {
        Facts {
            confirmation: Some(Confirmation {
                version: cache::VERSION,
                volumes: vec![cache::Confirmed {
                    volume_id: volume_id(),
                    kms_key_id: None,
                    disk: None,
                }],
                instance_id: "i-0123456789abcdef0".into(),
                boot_id: None,
                confirmed_at: Timestamp::UNIX_EPOCH,
            }),
            firmware: Firmware {
                vendor: Some("Amazon EC2".into()),
                instance_id: Some("i-0123456789abcdef0".into()),
            },
            mounts: vec![
                mount("/", ROOT, "/"),
                mount("/data", DATA, "/"),
                mount("/var/lib/docker", DATA, "/docker"),
                mount("/var/lib/containerd", DATA, "/containerd"),
            ],
            overlays: vec![],
            boot_id: "this".into(),
            device: Some(DataDevice::of_disk(volume_id(), disk()).layer),
            filesystem: None,
            seen: ["/data", "/var/lib/docker", "/var/lib/containerd"]
                .map(|path| (path.to_owned(), Some(DATA)))
                .into(),
            moved: vec![],
            links: vec![],
        }
    }

    fn moved(place: Option<&str>, device: DevNum) -> Vec<Moved> {
        let setting = "daemon.json sets data-root".to_owned();
        vec![Moved { setting, place: place.map(Into::into), device: Some(device) }]
    }

    fn link(place: &str, device: DevNum) -> Vec<InnerLink> {
        vec![InnerLink {
            path: "/var/lib/docker/overlay2".into(),
            target: place.into(),
            leads: Some((place.into(), device)),
        }]
    }

    fn overlay(mount_point: &str, upper: Option<&str>, device: Option<DevNum>) -> Overlay {
        Overlay { mount_point: mount_point.into(), upper: upper.map(Into::into), device }
    }

    #[test]
    fn links_that_stay_on_the_volume_are_nothing() {
        for place in ["/data/fast", "/var/lib/docker/big", "/var/lib/containerd/x"] {
            let facts = Facts { links: link(place, DATA), ..good() };
            judge(&Volume::default(), &facts).unwrap();
        }
    }

    #[test]
    fn storage_elsewhere_on_the_volume_is_on_the_volume() {
        for place in ["/data/mine", "/data/docker", "/data"] {
            let facts = Facts { moved: moved(Some(place), DATA), ..good() };
            judge(&Volume::default(), &facts).unwrap();
        }
    }

    type Break = fn(&mut Facts);

    #[test]
    fn opens_only_when_everything_is_in_place() {
        let volume = Volume::default();
        judge(&volume, &good()).unwrap();
        let table: [(&str, Break); 33] = [
            ("has not confirmed", |f| f.confirmation = None),
            ("does not tell which instance", |f| f.firmware.instance_id = None),
            ("belongs to", |f| f.firmware.instance_id = Some("i-0fffffffffffffff0".into())),
            ("nothing is mounted on /data", |f| _ = f.mounts.remove(1)),
            ("stacked on /data", |f| f.mounts.push(mount("/data", ROOT, "/"))),
            ("shows the directory /x", |f| f.mounts[1].root = "/x".into()),
            ("not mounted from a device", |f| f.device = None),
            ("changed while", |f| f.device.as_mut().unwrap().number = ROOT),
            ("EC2 confirmed", |f| {
                beneath(f, |disk| disk.serial = Some("vol0ffffffffffffffff".into()));
            }),
            ("no EBS volume", |f| beneath(f, |disk| disk.serial = None)),
            ("no EBS volume", |f| {
                beneath(f, |disk| disk.told_by = ToldBy::Mapping(None));
            }),
            ("not the volume's own disk", |f| {
                let layer = f.device.take().unwrap();
                f.device = Some(Layer {
                    kind: Kind::Mapping("LVM".into()),
                    on: vec![layer.clone()],
                    ..layer
                });
            }),
            ("an earlier boot", |f| {
                f.confirmation.as_mut().unwrap().boot_id = Some("earlier".into());
            }),
            ("nothing is mounted on /var/lib/docker", |f| _ = f.mounts.remove(2)),
            ("not on vol-", |f| f.mounts[3].device = ROOT),
            ("not /docker", |f| f.mounts[2].root = "/elsewhere".into()),
            ("a mount hides /var/lib/docker", |f| f.seen[1].1 = Some(ROOT)),
            ("a mount hides /var/lib/docker: nothing", |f| f.seen[1].1 = None),
            ("/var/lib/docker/overlay2 is mounted", |f| {
                f.mounts.push(mount("/var/lib/docker/overlay2", ROOT, "/"));
            }),
            ("/data/containerd/x is mounted", |f| {
                f.mounts.push(mount("/data/containerd/x", ROOT, "/"));
            }),
            ("sets data-root, which is not on", |f| f.moved = moved(Some("/srv/docker"), ROOT)),
            // On the volume, but where nobody waits for it.
            ("sets data-root, which is not on", |f| f.moved = moved(Some("/mnt/docker"), DATA)),
            ("sets data-root, which is not on", |f| f.moved = moved(Some("/data2/docker"), DATA)),
            // Below the mount point, and on another disk.
            ("sets data-root, which is not on", |f| f.moved = moved(Some("/data/x"), ROOT)),
            ("sets data-root, which is not on", |f| f.moved = moved(None, DATA)),
            ("/data/mine/overlay2 is mounted", |f| {
                f.moved = moved(Some("/data/mine"), DATA);
                f.mounts.push(mount("/data/mine/overlay2", ROOT, "/"));
            }),
            ("overlay on /var/lib/docker/volumes is kept in /srv/u", |f| {
                f.overlays.push(overlay("/var/lib/docker/volumes", Some("/srv/u"), Some(ROOT)));
            }),
            // It is not known what becomes of what is written there.
            ("overlay on /data/docker/overlay2/ab/merged is kept in", |f| {
                f.overlays.push(overlay("/data/docker/overlay2/ab/merged", Some("ab/diff"), None));
            }),
            ("/var/lib/docker/overlay2 is a link to /srv/x", |f| f.links = link("/srv/x", ROOT)),
            ("a link to /srv/x", |f| f.links = link("/srv/x", DATA)),
            ("a link to /data/x", |f| f.links = link("/data/x", ROOT)),
            ("it leads nowhere", |f| {
                f.links = link("/data/x", DATA);
                f.links[0].leads = None;
            }),
            ("belongs to", |f| f.confirmation.as_mut().unwrap().instance_id = "i-1".into()),
        ];
        for (expected, break_it) in table {
            let mut facts = good();
            break_it(&mut facts);
            let error = format!("{:#}", judge(&volume, &facts).unwrap_err());
            assert!(error.contains(expected), "expected {expected:?}, got {error:?}");
        }
    }

    #[test]
    fn an_assembled_device_needs_all_its_volumes() {
        let assembled = Volume {
            assembled: Some("/dev/mapper/d".to_owned().try_into().unwrap()),
            ..Volume::default()
        };
        let other = Disk { serial: Some("vol0ffffffffffffffff".into()), ..disk() };
        let on = |disks: &[&Disk]| Layer {
            name: "dm-0".into(),
            number: DATA,
            size: 8 << 30,
            kind: Kind::Mapping("LVM".into()),
            on: disks
                .iter()
                .map(|d| DataDevice::of_disk(volume_id(), (*d).clone()).layer)
                .collect(),
        };
        let mut facts = good();
        facts.device = Some(on(&[&disk()]));
        judge(&assembled, &facts).unwrap();
        facts.device = Some(on(&[&disk(), &other]));
        assert!(judge(&assembled, &facts).is_err(), "one of them was not confirmed");
        facts.confirmation.as_mut().unwrap().volumes.push(cache::Confirmed {
            volume_id: VolumeId::parse("vol-0ffffffffffffffff").unwrap(),
            kms_key_id: None,
            disk: None,
        });
        judge(&assembled, &facts).unwrap();
        facts.device = Some(on(&[&other]));
        assert!(judge(&assembled, &facts).is_err(), "one of them is not there");
        facts.device = Some(on(&[]));
        assert!(judge(&assembled, &facts).is_err(), "a mapping onto nothing");
    }

    #[test]
    fn on_xen_a_name_counts_in_the_boot_that_confirmed_it() {
        let mut facts = good();
        facts.firmware.instance_id = None;
        beneath(&mut facts, |disk| {
            *disk = Disk {
                name: "xvdf".into(),
                serial: None,
                told_by: ToldBy::Mapping(None),
                ..disk.clone()
            };
        });
        let confirmation = facts.confirmation.as_mut().unwrap();
        confirmation.volumes[0].disk = Some("xvdf".into());
        assert!(judge(&Volume::default(), &facts).is_err(), "without a boot");
        facts.confirmation.as_mut().unwrap().boot_id = Some("this".into());
        // Another volume under the same name carries something else.
        for other in [None, Some(uuid::Uuid::nil())] {
            facts.filesystem = other;
            let error = judge(&Volume::default(), &facts).unwrap_err().to_string();
            assert!(error.contains("not the filesystem that hostagent made"), "{error}");
        }
        facts.filesystem = Some(volume_id().filesystem_uuid());
        judge(&Volume::default(), &facts).unwrap();
        facts.confirmation.as_mut().unwrap().volumes[0].disk = Some("xvdg".into());
        assert!(judge(&Volume::default(), &facts).is_err());
    }

    #[test]
    fn what_docker_itself_mounts_is_no_stray() {
        let mut facts = good();
        let merged = "/var/lib/docker/overlay2/ab/merged";
        let mut own = mount(merged, DevNum { major: 0, minor: 50 }, "/");
        own.fs_type = "overlay".into();
        facts.mounts.push(own);
        let upper = "/var/lib/docker/overlay2/ab/diff";
        facts.overlays.push(overlay(merged, Some(upper), Some(DATA)));
        // Nothing can be written to it; and it is not Docker's.
        facts.overlays.push(overlay("/var/lib/docker/x", None, None));
        facts.overlays.push(overlay("/srv/x", Some("/srv/u"), Some(ROOT)));
        judge(&Volume::default(), &facts).unwrap();
    }

    #[test]
    fn a_key_that_is_not_accepted_any_more_closes_the_gate() {
        let key = "arn:aws:kms:us-east-1:111122223333:key/1";
        let narrow = Volume { kms_keys: vec![key.into()], ..Volume::default() };
        assert!(judge(&narrow, &good()).is_err(), "no key is known");
        let mut facts = good();
        facts.confirmation.as_mut().unwrap().volumes[0].kms_key_id = Some(key.into());
        judge(&narrow, &facts).unwrap();
    }
}

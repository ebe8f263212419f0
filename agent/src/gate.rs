//! The gate: whether Docker's storage is where it must be, by what this machine alone can tell.
//!
//! systemd runs it before every start of Docker and containerd. It starts no program and uses no
//! network. EC2's word that the volume is encrypted is taken from [`crate::aws::cache`]: encryption
//! cannot change in a volume's life, and the serial number of the disk that is mounted proves which
//! volume it is.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use crate::aws::cache::{self, Confirmation};
use crate::host::block::{self, DevNum, Disk};
use crate::host::identity::{self, Firmware};
use crate::host::mounts::{self, Mount};

/// Docker's storage directories, and the directories on the data volume that are mounted on them.
pub const STORAGE: [(&str, &str); 2] =
    [("/var/lib/docker", "docker"), ("/var/lib/containerd", "containerd")];

/// What the gate looks at.
struct Facts {
    confirmation: Option<Confirmation>,
    firmware: Firmware,
    data: Vec<Mount>,
    disk: Option<Disk>,
    storage: Vec<Vec<Mount>>,
}

/// Looks, and says in one sentence why Docker may start, or fails with why it may not.
pub fn check(mount_point: &Path) -> Result<String> {
    let data = mounts::at(mount_point)?;
    let disk = match data.last() {
        Some(mount) => block::disk_by_number(mount.device)?,
        None => None,
    };
    let storage =
        STORAGE.iter().map(|(path, _)| mounts::at(Path::new(path))).collect::<Result<_>>()?;
    let facts = Facts {
        confirmation: cache::read().context("reading which volume EC2 confirmed")?,
        firmware: identity::firmware()?,
        data,
        disk,
        storage,
    };
    judge(mount_point, &facts)
}

fn judge(mount_point: &Path, facts: &Facts) -> Result<String> {
    let place = mount_point.display();
    let Some(confirmation) = &facts.confirmation else {
        bail!(
            "EC2 has not confirmed an encrypted volume for this instance; run `hostagent provision`"
        );
    };
    let Some(instance_id) = &facts.firmware.instance_id else {
        bail!("the firmware does not tell which instance this is");
    };
    ensure!(
        *instance_id == confirmation.instance_id,
        "the confirmed volume belongs to {}, and this is {instance_id}; run `hostagent provision`",
        confirmation.instance_id
    );
    let volume = &confirmation.volume_id;
    let device = the_one(&facts.data, &place.to_string(), "/")?;
    let disk =
        facts.disk.as_ref().with_context(|| format!("{place} is not mounted from a disk"))?;
    ensure!(disk.number == device, "{place} changed while it was looked at");
    match disk.volume_id() {
        Some(id) if id == *volume => {}
        Some(id) => bail!("{place} is on {id}, and EC2 confirmed {volume}"),
        None => bail!("{place} is on {}, which is no EBS volume", disk.name),
    }
    for ((path, directory), mounts) in STORAGE.iter().zip(&facts.storage) {
        let there = the_one(mounts, path, &format!("/{directory}"))?;
        ensure!(there == device, "{path} is on the device {there}, not on {volume} ({device})");
    }
    Ok(format!("Docker's storage is on {volume}"))
}

/// The device of the one mount at a path, which must show the directory `root` of its filesystem.
fn the_one(mounts: &[Mount], path: &str, root: &str) -> Result<DevNum> {
    match mounts {
        [mount] if mount.root == root => Ok(mount.device),
        [mount] => bail!("{path} shows the directory {} of its filesystem, not {root}", mount.root),
        [] => bail!("nothing is mounted on {path}"),
        _ => bail!("{} mounts are stacked on {path}", mounts.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::VolumeId;
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
        }
    }

    fn good() -> Facts {
        Facts {
            confirmation: Some(Confirmation {
                version: cache::VERSION,
                volume_id: VolumeId::parse("vol-0123456789abcdef0").unwrap(),
                instance_id: "i-0123456789abcdef0".into(),
                kms_key_id: None,
                confirmed_at: Timestamp::UNIX_EPOCH,
            }),
            firmware: Firmware {
                vendor: Some("Amazon EC2".into()),
                instance_id: Some("i-0123456789abcdef0".into()),
            },
            data: vec![mount("/data", DATA, "/")],
            disk: Some(Disk {
                name: "nvme1n1".into(),
                number: DATA,
                serial: Some("vol0123456789abcdef0".into()),
                model: None,
                size: 8 << 30,
            }),
            storage: vec![
                vec![mount("/var/lib/docker", DATA, "/docker")],
                vec![mount("/var/lib/containerd", DATA, "/containerd")],
            ],
        }
    }

    type Break = fn(&mut Facts);

    #[test]
    fn opens_only_when_everything_is_in_place() {
        judge(Path::new("/data"), &good()).unwrap();
        let table: [(&str, Break); 13] = [
            ("has not confirmed", |f| f.confirmation = None),
            ("does not tell which instance", |f| f.firmware.instance_id = None),
            ("belongs to", |f| f.firmware.instance_id = Some("i-0fffffffffffffff0".into())),
            ("nothing is mounted on /data", |f| f.data.clear()),
            ("stacked on /data", |f| f.data.push(mount("/data", ROOT, "/"))),
            ("shows the directory /x", |f| f.data[0].root = "/x".into()),
            ("not mounted from a disk", |f| f.disk = None),
            ("changed while", |f| f.disk.as_mut().unwrap().number = ROOT),
            ("EC2 confirmed", |f| {
                f.disk.as_mut().unwrap().serial = Some("vol0ffffffffffffffff".into());
            }),
            ("no EBS volume", |f| f.disk.as_mut().unwrap().serial = None),
            ("nothing is mounted on /var/lib/docker", |f| f.storage[0].clear()),
            ("not on vol-", |f| f.storage[1][0].device = ROOT),
            ("shows the directory /docker", |f| f.storage[1][0].root = "/docker".into()),
        ];
        for (expected, break_it) in table {
            let mut facts = good();
            break_it(&mut facts);
            let error = judge(Path::new("/data"), &facts).unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?}, got {error:?}");
        }
    }
}

//! `data-mount`: the data volume is mounted at its mount point, by systemd, with safe options, and
//! will be again at the next boot.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::unit_path;
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::beneath::{self, Hidden};
use crate::host::blocking;
use crate::host::chain;
use crate::host::device::DataDevice;
use crate::host::files::{self, Place};
use crate::host::mounts::{self, Mount, unit_name};
use crate::host::systemd::Unit;
use crate::host::tree::human;
use crate::step::Step;
use crate::volume;

/// See the module.
pub struct DataMount;

/// Options that the mount must have.
const OPTIONS: [&str; 3] = ["nodev", "nosuid", "noatime"];

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// The data volume's device.
    pub device: Fact<DataDevice>,
    /// Its stable name, once udev has made it.
    pub link: Fact<Option<PathBuf>>,
    /// What is mounted on the mount point.
    pub mounts: Fact<Vec<Mount>>,
    /// What is at the mount point while nothing is mounted there.
    pub place: Fact<Option<Place>>,
    /// What the mount hides, if there is a mount.
    pub hidden: Fact<Option<Hidden>>,
    /// Whether the directory that the mount hides is immutable, if there is a mount.
    pub immutable: Fact<Option<bool>>,
    /// The content of the mount unit's file.
    pub unit_file: Fact<Option<String>>,
    /// The content of the device's time-out file.
    pub timeout_file: Fact<Option<String>>,
    /// The mount unit as systemd has it loaded.
    pub unit: Fact<Unit>,
}

/// The files that hostagent writes for the mount, with their content.
struct Files {
    unit: (PathBuf, String),
    timeout: (PathBuf, String),
}

impl Control for DataMount {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "data-mount",
        title: "The data volume is mounted",
        why: "Docker's storage hangs on this mount. It is a unit of systemd's, by the disk's serial \
              number (Xen: the filesystem's UUID), so that Docker's start can depend on it at every boot.",
        requires: &["data-filesystem"],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let mount_point = cx.config.volume.mount_point.path();
        let device = volume::find(cx).await;
        let link = match &device {
            Ok(device) => chain::stable_name(&device.layer),
            Err(e) => Err(anyhow::anyhow!("the device is not known: {e:#}")),
        };
        let mounts = mounts::at(mount_point);
        let place = match &mounts {
            Ok(mounts) if mounts.is_empty() => files::place(mount_point).map(Some),
            _ => Ok(None),
        };
        let (hidden, immutable) = match &mounts {
            Ok(mounts) if !mounts.is_empty() => {
                let path = mount_point.to_path_buf();
                let hidden = blocking(move || beneath::hidden(&path)).await;
                (hidden, beneath::is_immutable(mount_point).map(Some))
            }
            _ => (Ok(None), Ok(None)),
        };
        let unit_file = unit_path(&unit_name(mount_point, "mount"));
        let timeout_file = match &link {
            Ok(Some(link)) => files::read_optional(&timeout_path(link)),
            _ => Ok(None),
        };
        let unit = async { cx.host.systemd().await?.unit(&unit_name(mount_point, "mount")).await };
        Facts {
            device: Fact::new("/sys/block", device),
            link: Fact::new("/dev/disk/by-id", link),
            mounts: Fact::new("/proc/self/mountinfo", mounts),
            place: Fact::new(mount_point.display().to_string(), place),
            hidden: Fact::new(format!("beneath {}", mount_point.display()), hidden),
            immutable: Fact::new(format!("beneath {}", mount_point.display()), immutable),
            unit_file: Fact::new(unit_file.display().to_string(), files::read_optional(&unit_file)),
            timeout_file: Fact::new("the device unit's drop-in", timeout_file),
            unit: Fact::new("systemd (D-Bus)", unit.await),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let mount_point = &config.volume.mount_point;
        let device = facts.device.known()?;
        let expected = format!(
            "{} mounted on {mount_point} by {}",
            device.volumes,
            unit_name(mount_point.path(), "mount")
        );
        let remedy = "run `hostagent provision`";
        if let Some(wrong) = wrong_mount(config, device, facts.mounts.known()?) {
            return Ok(Verdict::fail(expected, wrong, remedy));
        }
        let Some(files) = expected_files(config, facts)? else {
            return Err(Unknown(format!("udev has no link for {}", device.volumes)));
        };
        let unit = facts.unit.known()?;
        let in_force = facts.unit_file.known()?.as_ref() == Some(&files.unit.1)
            && facts.timeout_file.known()?.as_ref() == Some(&files.timeout.1)
            && Path::new(&unit.fragment_path) == files.unit.0
            && !unit.need_daemon_reload;
        if !in_force {
            let observed =
                format!("{} is not the unit that hostagent writes", files.unit.0.display());
            return Ok(Verdict::fail(expected, observed, remedy));
        }
        if unit.active_state != "active" {
            return Err(Unknown(format!("it is mounted, but systemd says {}", unit.active_state)));
        }
        if let Some(observed) = hides(config, facts.hidden.known()?.as_ref()) {
            let remedy = format!(
                "look at it with `mount --bind / /mnt` in /mnt{mount_point}, move it away or remove \
                 it, and `umount /mnt`"
            );
            let expected = format!("nothing on the root disk beneath the mount on {mount_point}");
            return Ok(Verdict::fail(expected, observed, remedy));
        }
        if *facts.immutable.known()? == Some(false) {
            let observed = format!(
                "the directory beneath the mount on {mount_point} is not immutable: at a boot without \
                 the volume, the root disk can be written to there"
            );
            let expected = format!("an immutable directory beneath the mount on {mount_point}");
            return Ok(Verdict::fail(expected, observed, remedy));
        }
        Ok(Verdict::pass(format!("{} is mounted on {mount_point}", device.volumes)))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let mount_point = &config.volume.mount_point;
        let device = facts.device.known()?;
        let mounts = facts.mounts.known()?;
        if !mounts.is_empty()
            && let Some(wrong) = wrong_mount(config, device, mounts)
        {
            return Ok(Plan::refuse(format!("{wrong}; unmount it, and see what mounts it")));
        }
        let Some(files) = expected_files(config, facts)? else {
            return Ok(Plan::refuse(format!("udev has no link for {}", device.volumes)));
        };
        let mut steps = Vec::new();
        match facts.place.known()? {
            Some(Place::Empty { immutable: true }) | None => {}
            Some(Place::Empty { immutable: false } | Place::Absent) => {
                steps.push(Step::PrepareMountPoint { path: mount_point.path().to_path_buf() });
            }
            Some(Place::Occupied(entries)) => {
                return Ok(Plan::refuse(format!(
                    "{mount_point} holds {entries} entries on the root disk, which the mount would \
                     hide; move them away"
                )));
            }
            Some(Place::Symlink(target)) => {
                return Ok(Plan::refuse(format!(
                    "{mount_point} is a link to {target}; remove the link, or set volume.mount_point"
                )));
            }
            Some(Place::NotADirectory) => {
                return Ok(Plan::refuse(format!("{mount_point} is not a directory")));
            }
        }
        let unit = facts.unit.known()?;
        let mut reload = unit.need_daemon_reload;
        let mut write = |current: &Option<String>, (path, content): (PathBuf, String)| {
            let differs = current.as_ref() != Some(&content);
            if differs {
                steps.push(Step::WriteFile { path, content, mode: 0o644 });
            }
            differs
        };
        // The device's time-out counts at the next boot, which reads it anyway.
        write(facts.timeout_file.known()?, files.timeout);
        // A unit that was not there is read when it is started; only a changed one needs a reload.
        reload |= write(facts.unit_file.known()?, files.unit) && unit.exists();
        if reload {
            steps.push(Step::ReloadManager);
        }
        if mounts.is_empty() {
            let Some(link) = facts.link.known()?.clone() else {
                return Err(Unknown("the device has no stable name".into()));
            };
            let unit = unit_name(mount_point.path(), "mount");
            steps.push(Step::MountVolume { unit, link, volumes: device.volumes.clone() });
        }
        let hidden = hides(config, facts.hidden.known()?.as_ref());
        if let (true, Some(observed)) = (steps.is_empty(), &hidden) {
            return Ok(Plan::refuse(format!("{observed}; hostagent removes nobody's data")));
        }
        if *facts.immutable.known()? == Some(false) && hidden.is_none() {
            steps.push(Step::GuardMountPoint { path: mount_point.path().to_path_buf() });
        }
        Ok(Plan::steps(steps))
    }
}

/// What the mount hides, if it hides anything.
fn hides(config: &Config, hidden: Option<&Hidden>) -> Option<String> {
    let Hidden { path, usage } = hidden?;
    let (place, size, inodes) = (&config.volume.mount_point, human(usage.bytes), usage.inodes);
    Some(format!(
        "beneath the mount on {place} the root disk holds data: {path} and more, {size} in {inodes} \
         files"
    ))
}

/// What is wrong with what is mounted on the mount point, if anything is.
fn wrong_mount(config: &Config, device: &DataDevice, mounts: &[Mount]) -> Option<String> {
    let place = &config.volume.mount_point;
    let mount = match mounts {
        [] => return Some(format!("nothing is mounted on {place}")),
        [mount] => mount,
        _ => return Some(format!("{} mounts are stacked on {place}", mounts.len())),
    };
    if mount.device != device.number() || mount.root != "/" {
        return Some(format!(
            "the device {} (directory {}) is mounted on {place}, not {} ({})",
            mount.device,
            mount.root,
            device.volumes,
            device.number()
        ));
    }
    if mount.fs_type != config.volume.filesystem.as_str() {
        return Some(format!("{place} is mounted as {}", mount.fs_type));
    }
    if mount.read_only {
        return Some(format!("the filesystem on {place} is read-only; see `journalctl -k`"));
    }
    let missing: Vec<&str> = OPTIONS
        .into_iter()
        .chain(["rw"])
        .filter(|o| !mount.options.iter().any(|m| m == o))
        .collect();
    (!missing.is_empty()).then(|| format!("{place} is mounted without {}", missing.join(", ")))
}

/// None while udev has no link for the disk.
fn expected_files(config: &Config, facts: &Facts) -> Result<Option<Files>, Unknown> {
    let Some(link) = facts.link.known()? else { return Ok(None) };
    let mount_point = config.volume.mount_point.path();
    let unit = format!(
        "# Written by hostagent (control data-mount). Changes are overwritten.\n\
         [Unit]\n\
         Description=Encrypted data volume {volume}\n\
         Documentation=file:/usr/share/doc/hostagent/README.md\n\
         # A check belongs before the mount, and only systemd-fsck knows when one is due.\n\
         Wants=systemd-fsck@{fsck}\n\
         After=systemd-fsck@{fsck}\n\
         \n\
         [Mount]\n\
         # By {by}: no other disk gets this link, whatever the kernel calls it.\n\
         What={link}\n\
         Where={place}\n\
         Type={fs}\n\
         # nofail: not ordered before local-fs.target, so that a missing volume cannot stop the boot.\n\
         Options={options},nofail\n",
        volume = facts.device.known()?.volumes,
        fsck = unit_name(link, "service"),
        by = if link.starts_with(chain::BY_UUID) {
            "the UUID that follows from the volume's id"
        } else {
            "serial number"
        },
        link = link.display(),
        place = mount_point.display(),
        fs = config.volume.filesystem.as_str(),
        options = OPTIONS.join(","),
    );
    // x-systemd.device-timeout is read from fstab only (systemd.mount(5)).
    let timeout = "# Written by hostagent (control data-mount). Changes are overwritten.\n\
                   [Unit]\n\
                   # How long a boot waits for the volume before Docker is given up.\n\
                   JobRunningTimeoutSec=30\n";
    Ok(Some(Files {
        unit: (unit_path(&unit_name(mount_point, "mount")), unit),
        timeout: (timeout_path(link), timeout.to_owned()),
    }))
}

fn timeout_path(link: &Path) -> PathBuf {
    unit_path(&format!("{}.d", unit_name(link, "device"))).join("10-hostagent.conf")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::DevNum;
    use anyhow::anyhow;

    const DATA: DevNum = DevNum { major: 259, minor: 1 };

    fn mount() -> Mount {
        Mount {
            device: DATA,
            root: "/".into(),
            mount_point: "/data".into(),
            fs_type: "ext4".into(),
            options: ["noatime", "nodev", "nosuid", "rw"].map(str::to_owned).to_vec(),
            read_only: false,
        }
    }

    fn bare() -> Facts {
        let link = PathBuf::from("/dev/disk/by-id/nvme-X_vol0123456789abcdef0_1");
        Facts {
            device: Fact::new("t", Ok(crate::host::device::example(DATA))),
            link: Fact::new("t", Ok(Some(link))),
            mounts: Fact::new("t", Ok(vec![])),
            place: Fact::new("t", Ok(Some(Place::Absent))),
            hidden: Fact::new("t", Ok(None)),
            immutable: Fact::new("t", Ok(None)),
            unit_file: Fact::new("t", Ok(None)),
            timeout_file: Fact::new("t", Ok(None)),
            unit: Fact::new("t", Ok(Unit { load_state: "not-found".into(), ..Unit::default() })),
        }
    }

    fn mounted() -> Facts {
        let config = Config::default();
        let files = expected_files(&config, &bare()).unwrap().unwrap();
        Facts {
            mounts: Fact::new("t", Ok(vec![mount()])),
            place: Fact::new("t", Ok(None)),
            immutable: Fact::new("t", Ok(Some(true))),
            unit: Fact::new(
                "t",
                Ok(Unit {
                    load_state: "loaded".into(),
                    active_state: "active".into(),
                    fragment_path: files.unit.0.display().to_string(),
                    ..Unit::default()
                }),
            ),
            unit_file: Fact::new("t", Ok(Some(files.unit.1))),
            timeout_file: Fact::new("t", Ok(Some(files.timeout.1))),
            ..bare()
        }
    }

    fn judge(facts: &Facts) -> String {
        match DataMount.judge(&Config::default(), facts) {
            Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
            Err(Unknown(why)) => format!("unknown: {why}"),
        }
    }

    #[test]
    fn the_volume_mounted_by_our_unit_passes_and_needs_nothing() {
        assert!(judge(&mounted()).starts_with("pass"), "{}", judge(&mounted()));
        assert_eq!(DataMount.plan(&Config::default(), &mounted()), Ok(Plan::Nothing));
    }

    #[test]
    fn a_bare_host_gets_directory_files_and_mount_in_this_order() {
        let Ok(Plan::Steps(steps)) = DataMount.plan(&Config::default(), &bare()) else { panic!() };
        let texts: Vec<String> = steps.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "make /data an empty, immutable directory",
                "write /etc/systemd/system/dev-disk-by\\x2did-nvme\\x2dX_vol0123456789abcdef0_1.device.d/10-hostagent.conf",
                "write /etc/systemd/system/data.mount",
                "mount vol-0123456789abcdef0 (data.mount)",
            ]
        );
    }

    #[test]
    fn on_xen_it_is_mounted_by_what_hostagent_made_on_it() {
        let link = PathBuf::from("/dev/disk/by-uuid/f0b4e71b-1faa-5482-8fe4-ee9f5521efef");
        let facts = Facts { link: Fact::new("t", Ok(Some(link))), ..bare() };
        let unit = expected_files(&Config::default(), &facts).unwrap().unwrap().unit.1;
        assert!(unit.contains("\nWhat=/dev/disk/by-uuid/f0b4e71b-"), "{unit}");
        assert!(unit.contains("\n# By the UUID that follows from the volume's id: "), "{unit}");
    }

    #[test]
    fn a_wrong_mount_fails_and_is_not_touched() {
        let cases: [fn(&mut Vec<Mount>); 7] = [
            |m| m[0].read_only = true,
            |m| m[0].device = DevNum { major: 254, minor: 1 },
            |m| m[0].root = "/sub".into(),
            |m| m[0].fs_type = "xfs".into(),
            |m| m[0].options.retain(|o| o != "nosuid"),
            |m| m[0].options.retain(|o| o != "rw"),
            |m| m.push(mount()),
        ];
        for (i, change) in cases.into_iter().enumerate() {
            let mut mounts = vec![mount()];
            change(&mut mounts);
            let facts = Facts { mounts: Fact::new("t", Ok(mounts)), ..mounted() };
            assert!(judge(&facts).starts_with("fail"), "case {i}: {}", judge(&facts));
            let plan = DataMount.plan(&Config::default(), &facts);
            assert!(matches!(plan, Ok(Plan::Refuse { .. })), "case {i}: {plan:?}");
        }
    }

    #[test]
    fn what_would_be_hidden_is_refused() {
        for place in [Place::Occupied(3), Place::Symlink("/x".into()), Place::NotADirectory] {
            let facts = Facts { place: Fact::new("t", Ok(Some(place))), ..bare() };
            let plan = DataMount.plan(&Config::default(), &facts);
            assert!(matches!(plan, Ok(Plan::Refuse { .. })), "{plan:?}");
        }
    }

    #[test]
    fn what_is_hidden_fails_and_is_not_touched() {
        let usage = crate::host::tree::Usage { bytes: 4096, inodes: 2 };
        let hidden = Hidden { path: "/data/records".into(), usage };
        let facts = Facts { hidden: Fact::new("t", Ok(Some(hidden))), ..mounted() };
        assert!(
            judge(&facts).contains("/data/records and more, 4.0 KiB in 2"),
            "{}",
            judge(&facts)
        );
        let plan = DataMount.plan(&Config::default(), &facts);
        assert!(matches!(plan, Ok(Plan::Refuse { .. })), "{plan:?}");
    }

    #[test]
    fn what_the_mount_hides_is_made_immutable() {
        let open = || Fact::new("t", Ok(Some(false)));
        let facts = Facts { immutable: open(), ..mounted() };
        assert!(judge(&facts).starts_with("fail: the directory beneath"), "{}", judge(&facts));
        let texts = |facts: &Facts| match DataMount.plan(&Config::default(), facts).unwrap() {
            Plan::Steps(steps) => steps.iter().map(ToString::to_string).collect(),
            other => vec![format!("{other:?}")],
        };
        let step = "make the directory beneath the mount on /data immutable";
        assert_eq!(texts(&facts), [step]);
        // Mounted by hand, before the first run.
        let by_hand = Facts { unit_file: Fact::new("t", Ok(None)), ..facts };
        let planned = texts(&by_hand);
        assert_eq!((planned.len(), planned.last().unwrap().as_str()), (3, step), "{planned:?}");
        // What holds something is not barred: it has to be moved away first.
        let usage = crate::host::tree::Usage { bytes: 1, inodes: 1 };
        let hidden = Fact::new("t", Ok(Some(Hidden { path: "/data/x".into(), usage })));
        let full = Facts { hidden, immutable: open(), ..mounted() };
        assert!(texts(&full)[0].starts_with("Refuse"), "{:?}", texts(&full));
    }

    #[test]
    fn a_mount_that_would_not_come_back_fails() {
        let changed = Facts { unit_file: Fact::new("t", Ok(Some("else".into()))), ..mounted() };
        assert!(judge(&changed).starts_with("fail"));
        let manual = Facts { unit_file: Fact::new("t", Ok(None)), ..mounted() };
        assert!(judge(&manual).starts_with("fail"));
    }

    #[test]
    fn an_unknown_fact_never_passes() {
        let all: [fn(&mut Facts); 7] = [
            |f| f.hidden = Fact::new("t", Err(anyhow!("x"))),
            |f| f.immutable = Fact::new("t", Err(anyhow!("x"))),
            |f| f.device = Fact::new("t", Err(anyhow!("x"))),
            |f| f.link = Fact::new("t", Err(anyhow!("x"))),
            |f| f.mounts = Fact::new("t", Err(anyhow!("x"))),
            |f| f.unit_file = Fact::new("t", Err(anyhow!("x"))),
            |f| f.unit = Fact::new("t", Err(anyhow!("x"))),
        ];
        for (i, hide) in all.into_iter().enumerate() {
            let mut facts = mounted();
            hide(&mut facts);
            assert!(judge(&facts).starts_with("unknown"), "case {i}: {}", judge(&facts));
            assert!(DataMount.plan(&Config::default(), &facts).is_err(), "case {i}");
        }
    }
}

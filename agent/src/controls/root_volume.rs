//! `root-volume`: the volume that the system is on is encrypted or, where the configuration lets it
//! be plain, keeps nothing that a container says.
//!
//! What a container says reaches the root disk through journald, whatever Docker's log driver is
//! (every container can name its own, and a unit that runs `docker run` has its output there),
//! through a syslog daemon that journald feeds, and through `/tmp`. Core dumps and swap are their own
//! controls.

mod leaks;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Once;

use serde::Serialize;

use crate::aws::ec2::AttachedVolume;
use crate::config::{Config, RootEncryption};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block;
use crate::host::ground::{self, Ground};
use crate::volume;
use leaks::Leaks;

/// See the module.
pub struct RootVolume;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// What `/` rests on.
    pub root: Fact<Vec<Ground>>,
    /// The volumes that EC2 has attached to this instance.
    pub attached: Fact<Vec<AttachedVolume>>,
    /// What could write to it; looked at only where it is plain and may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leaks: Option<Leaks>,
}

/// What is known of the root volume's encryption.
enum Root {
    Encrypted(String),
    Plain(String),
}

impl Control for RootVolume {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "root-volume",
        title: "The root volume is encrypted",
        why: "What containers say ends up in logs and temporary files of the host. They are on the \
              root volume, and in every snapshot and image of it.",
        requires: &[],
        // That control is what waits for EC2's answer.
        acts_after: &["data-volume"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let disks = block::disks();
        let attached = match &disks {
            Ok(disks) => cx.aws.attached_volumes(disks).await,
            Err(e) => Fact::new("EC2 DescribeVolumes", Err(anyhow::anyhow!("not asked: {e:#}"))),
        };
        let mut root = beneath("/");
        // On Xen a disk does not tell its volume; EC2's mapping does.
        if let (Ok(root), Ok(disks), Ok(attached)) = (&mut root, &disks, attached.known())
            && let Ok(disks) = volume::with_mapping(disks, attached)
        {
            for ground in root {
                if let Ground::Disk(disk) = ground
                    && let Some(known) = disks.iter().find(|known| known.number == disk.number)
                {
                    *disk = known.clone();
                }
            }
        }
        let root = Fact::new("/proc/self/mountinfo, /sys/dev/block", root);
        let mut facts = Facts { root, attached, leaks: None };
        if let (Ok(Root::Plain(what)), policy @ (RootEncryption::Warn | RootEncryption::Allow)) =
            (root_volume(&facts), cx.config.root.encryption)
        {
            static WARNED: Once = Once::new();
            if policy == RootEncryption::Warn {
                WARNED.call_once(|| {
                    tracing::warn!(control = "root-volume", "{what}; root.encryption allows it");
                });
            }
            facts.leaks = Some(Leaks::observe(cx).await);
        }
        facts
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let what = match root_volume(facts)? {
            Root::Encrypted(what) => return Ok(Verdict::pass(what)),
            Root::Plain(what) => what,
        };
        if config.root.encryption == RootEncryption::Require {
            return Ok(Verdict::fail("an encrypted root volume", what, REMEDY));
        }
        let Some(leaks) = &facts.leaks else {
            return Err(Unknown(format!("{what}, and what is kept there was not looked at")));
        };
        if let Some(wrong) = leaks.wrong(&facts.attached)? {
            return Ok(Verdict::fail(
                "nothing of what containers say kept on the plain root volume",
                format!("{what}, and {wrong}"),
                "run `hostagent provision`",
            ));
        }
        let mut text = format!("{what}; the journal and /tmp are not kept there");
        if config.root.encryption == RootEncryption::Warn {
            text.insert_str(0, "WARNING: ");
        } else {
            text.push_str(", and root.encryption allows it");
        }
        Ok(Verdict::pass(text))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        if let Root::Encrypted(_) = root_volume(facts)? {
            return Ok(Plan::Nothing);
        }
        if config.root.encryption == RootEncryption::Require {
            return Ok(Plan::refuse("the encryption of a volume cannot be changed"));
        }
        let Some(leaks) = &facts.leaks else {
            return Err(Unknown("what is kept on the root volume was not looked at".into()));
        };
        leaks.plan(&facts.attached)
    }
}

const REMEDY: &str = "begin with an instance whose root volume is encrypted: from an encrypted copy \
                      of the image, with `Encrypted` in the launch template's mapping of the root \
                      device, or with EBS encryption by default in the account's region; or set \
                      root.encryption";

/// What EC2 says of every disk beneath `/`.
fn root_volume(facts: &Facts) -> Result<Root, Unknown> {
    let root = facts.root.known()?;
    if root.iter().all(Ground::hides) {
        return Ok(Root::Encrypted(format!("/ is on {}", names(root))));
    }
    let attached = facts.attached.known()?;
    let mut seen = String::new();
    for layer in root.iter().filter(|layer| !layer.hides()) {
        match encryption(layer, attached)? {
            None => return Ok(Root::Plain(format!("the root volume {layer} is not encrypted"))),
            Some(key) => {
                let and = if seen.is_empty() { "" } else { ", and " };
                // Writing to a String cannot fail.
                _ = write!(seen, "{and}the root volume {layer} is encrypted with {key}");
            }
        }
    }
    Ok(Root::Encrypted(seen))
}

/// The key with which EC2 says that a disk is encrypted; none if it says that it is not.
fn encryption(layer: &Ground, attached: &[AttachedVolume]) -> Result<Option<String>, Unknown> {
    let Ground::Disk(disk) = layer else { return Ok(Some(layer.to_string())) };
    let Some(id) = disk.volume_id() else {
        return Err(Unknown(format!("the disk {} has no volume id as serial number", disk.name)));
    };
    let volume = attached.iter().find(|volume| volume.volume_id == id);
    match volume.map(|volume| (volume.encrypted, &volume.kms_key_id)) {
        None => Err(Unknown(format!("EC2 does not name {id} among this instance's volumes"))),
        Some((None, _)) => Err(Unknown(format!("EC2 does not say whether {id} is encrypted"))),
        Some((Some(false), _)) => Ok(None),
        Some((Some(true), key)) => {
            Ok(Some(key.clone().unwrap_or_else(|| "an unnamed key".to_owned())))
        }
    }
}

/// Whether what is written there reaches no plain disk.
fn is_fit(layers: &[Ground], attached: &Fact<Vec<AttachedVolume>>) -> Result<bool, Unknown> {
    for layer in layers.iter().filter(|layer| !layer.hides()) {
        if encryption(layer, attached.known()?)?.is_none() {
            return Ok(false);
        }
    }
    Ok(!layers.is_empty())
}

fn names(layers: &[Ground]) -> String {
    layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

fn beneath(path: &str) -> anyhow::Result<Vec<Ground>> {
    ground::of_path(Path::new(path))?.ok_or_else(|| anyhow::anyhow!("there is no {path}"))
}

#[cfg(test)]
mod tests {
    use super::leaks::{JOURNALD_FILE, LOCAL_FS};
    use super::*;
    use crate::host::block::{DevNum, Disk, VolumeId};
    use crate::host::docker::HeldFile;
    use crate::host::logs::{self, LogDriver};
    use crate::host::mounts::Mount;
    use crate::host::settings::Setting;
    use crate::host::systemd::Unit;
    use anyhow::anyhow;
    use jiff::Timestamp;

    const ROOT: &str = "vol-0aaaaaaaaaaaaaaa0";
    const DATA: &str = "vol-0123456789abcdef0";

    fn disk(volume: &str) -> Ground {
        Ground::Disk(Disk {
            name: "nvme0n1".into(),
            number: DevNum { major: 259, minor: 0 },
            serial: Some(volume.replacen('-', "", 1)),
            model: None,
            size: 8 << 30,
            told_by: block::ToldBy::Serial,
        })
    }

    fn memory() -> Vec<Ground> {
        vec![Ground::Memory("tmpfs".into())]
    }

    fn volume(id: &str, encrypted: Option<bool>) -> AttachedVolume {
        AttachedVolume {
            volume_id: VolumeId::parse(id).unwrap(),
            device: Some("/dev/xvda".into()),
            attachment: Some("attached".into()),
            encrypted,
            kms_key_id: encrypted.filter(|is| *is).map(|_| "arn:key".into()),
            attachments: 1,
            size_gib: Some(8),
            tags: [].into(),
        }
    }

    fn setting(value: &str, changed: i64) -> Fact<Option<Setting>> {
        let changed = Timestamp::from_second(changed).unwrap();
        let file = JOURNALD_FILE.into();
        Fact::new("t", Ok(Some(Setting { value: value.into(), file, changed })))
    }

    const STARTED: i64 = 1_000;

    fn unit(fragment: &str, wanted_by: &[&str]) -> Unit {
        let there = !fragment.is_empty();
        Unit {
            load_state: if there { "loaded" } else { "not-found" }.into(),
            active_state: if there { "active" } else { "inactive" }.into(),
            fragment_path: fragment.into(),
            wanted_by: wanted_by.iter().map(|&name| name.to_owned()).collect(),
            main_started: Some(Timestamp::from_second(STARTED).unwrap()),
            ..Unit::default()
        }
    }

    /// An old Debian on a plain root volume, on which nothing was put right yet.
    fn open() -> Facts {
        let held = HeldFile {
            path: format!("{}/ab/system.journal", logs::PERSISTENT_JOURNAL),
            device: DevNum { major: 259, minor: 0 },
        };
        let driver =
            LogDriver { name: "json-file".into(), syslog_address: None, by: "default".into() };
        let leaks = Leaks {
            journal: Fact::new("t", Ok(vec![disk(ROOT)])),
            logs: Fact::new("t", Ok(vec![disk(ROOT)])),
            storage: Fact::new("t", Ok(None)),
            forward: Fact::new("t", Ok(None)),
            journald: Fact::new("t", Ok(unit("/usr/lib/j", &[]))),
            held: Fact::new("t", Ok(vec![held])),
            syslog: Fact::new("t", Ok(unit("/usr/lib/rsyslog.service", &["multi-user.target"]))),
            journal_reader: Fact::new("t", Ok(None)),
            tmp: Fact::new("t", Ok(vec![disk(ROOT)])),
            tmp_mounts: Fact::new("t", Ok(vec![])),
            tmp_unit: Fact::new("t", Ok(unit("", &[]))),
            driver: Fact::new("t", Ok(driver)),
        };
        Facts {
            root: Fact::new("t", Ok(vec![disk(ROOT)])),
            attached: Fact::new("t", Ok(vec![volume(ROOT, Some(false)), volume(DATA, Some(true))])),
            leaks: Some(leaks),
        }
    }

    /// The same, put right.
    fn shut() -> Facts {
        let mut facts = open();
        let leaks = facts.leaks.as_mut().unwrap();
        leaks.storage = setting("volatile", STARTED - 1);
        leaks.forward = setting("no", STARTED - 1);
        leaks.held = Fact::new("t", Ok(vec![]));
        leaks.tmp = Fact::new("t", Ok(memory()));
        leaks.tmp_unit = Fact::new("t", Ok(unit("/usr/lib/tmp.mount", &[LOCAL_FS])));
        facts
    }

    fn config(encryption: RootEncryption) -> Config {
        let mut config = Config::default();
        config.root.encryption = encryption;
        config
    }

    fn judge_as(encryption: RootEncryption, facts: &Facts) -> String {
        match RootVolume.judge(&config(encryption), facts) {
            Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
            Err(Unknown(why)) => format!("unknown: {why}"),
        }
    }

    fn judge(facts: &Facts) -> String {
        judge_as(RootEncryption::Warn, facts)
    }

    fn texts(facts: &Facts) -> (Vec<String>, String) {
        let (steps, why) = match RootVolume.plan(&config(RootEncryption::Warn), facts).unwrap() {
            Plan::Nothing => (vec![], String::new()),
            Plan::Steps(steps) => (steps, String::new()),
            Plan::Refuse { why } => (vec![], why),
            Plan::Contain { steps, why } => (steps, why),
        };
        (steps.iter().map(ToString::to_string).collect(), why)
    }

    fn leaks(facts: &mut Facts) -> &mut Leaks {
        facts.leaks.as_mut().unwrap()
    }

    #[test]
    fn the_policy_decides_about_a_plain_root_volume() {
        use RootEncryption::{Allow, Require, Warn};
        let said = "the root volume vol-0aaaaaaaaaaaaaaa0 is not encrypted";
        assert_eq!(judge_as(Require, &shut()), format!("fail: {said}"));
        let plan = RootVolume.plan(&config(Require), &shut()).unwrap();
        assert!(matches!(plan, Plan::Refuse { .. }), "{plan:?}");
        let warned = judge_as(Warn, &shut());
        assert!(warned.starts_with(&format!("pass: WARNING: {said}")), "{warned}");
        let allowed = judge_as(Allow, &shut());
        assert!(allowed.starts_with("pass: ") && !allowed.contains("WARNING"), "{allowed}");
        for policy in [Warn, Allow] {
            assert!(judge_as(policy, &open()).starts_with("fail"));
            // Not looked at is not the same as nothing there.
            let blind = Facts { leaks: None, ..shut() };
            assert!(judge_as(policy, &blind).starts_with("unknown"));
            assert!(RootVolume.plan(&config(policy), &blind).is_err());
        }
    }

    #[test]
    fn every_disk_beneath_the_root_counts() {
        let on = |layers: Vec<Ground>, volumes: Vec<AttachedVolume>| {
            let facts = Facts {
                root: Fact::new("t", Ok(layers)),
                attached: Fact::new("t", Ok(volumes)),
                leaks: None,
            };
            judge_as(RootEncryption::Require, &facts).split(':').next().unwrap().to_owned()
        };
        let both = || vec![volume(ROOT, Some(true)), volume(DATA, Some(false))];
        assert_eq!(on(vec![disk(ROOT)], both()), "pass");
        assert_eq!(on(vec![disk(DATA)], both()), "fail");
        assert_eq!(on(vec![disk(ROOT), disk(DATA)], both()), "fail");
        assert_eq!(on(vec![disk(ROOT)], vec![volume(ROOT, None)]), "unknown");
        assert_eq!(on(vec![disk(ROOT)], vec![volume(DATA, Some(true))]), "unknown");
        assert_eq!(on(vec![disk("vda")], both()), "unknown");
        assert_eq!(on(vec![Ground::Crypt("root".into())], vec![]), "pass");
        assert_eq!(on(vec![Ground::Crypt("root".into()), disk(DATA)], both()), "fail");
    }

    type Way = fn(&mut Leaks);

    #[test]
    fn every_way_to_the_disk_fails_by_itself() {
        assert!(judge(&shut()).starts_with("pass"), "{}", judge(&shut()));
        assert_eq!(texts(&shut()), (vec![], String::new()));
        let open_ways: [(&str, Way); 12] = [
            ("persistent", |l| l.storage = Fact::new("t", Ok(None))),
            ("persistent", |l| l.storage = setting("auto", 0)),
            ("persistent", |l| l.storage = setting("persistent", 0)),
            ("journald writes", |l| l.held = open().leaks.unwrap().held),
            ("longer than", |l| l.storage = setting("none", STARTED + 1)),
            ("forwards", |l| l.forward = Fact::new("t", Ok(None))),
            ("forwards", |l| l.forward = setting("yes", 0)),
            ("rsyslog reads", |l| l.journal_reader = Fact::new("t", Ok(Some("/etc/r".into())))),
            ("/tmp is there", |l| l.tmp = Fact::new("t", Ok(vec![disk(ROOT)]))),
            ("next boot", |l| l.tmp_unit = Fact::new("t", Ok(unit("", &[LOCAL_FS])))),
            ("next boot", |l| l.tmp_unit = Fact::new("t", Ok(unit("/x", &["a.service"])))),
            ("log driver", |l| {
                let driver = LogDriver { name: "x/y".into(), syslog_address: None, by: "f".into() };
                l.driver = Fact::new("t", Ok(driver));
            }),
        ];
        for (expected, way) in open_ways {
            let mut facts = shut();
            way(leaks(&mut facts));
            let text = judge(&facts);
            assert!(text.starts_with("fail") && text.contains(expected), "{expected}: {text}");
            let (steps, why) = texts(&facts);
            assert!(!steps.is_empty() || !why.is_empty(), "{expected}: nothing is done");
        }
    }

    #[test]
    fn an_old_debian_is_put_right() {
        let (steps, why) = texts(&open());
        assert_eq!(
            steps,
            [
                "write /etc/systemd/journald.conf.d/zz-hostagent.conf",
                "restart systemd-journald.service",
                "write /etc/systemd/system/tmp.mount",
                "write /etc/systemd/system/local-fs.target.d/10-hostagent.conf",
                "make systemd read its units again",
                "start tmp.mount",
            ]
        );
        assert_eq!(why, "");
    }

    #[test]
    fn what_is_on_an_encrypted_volume_is_left_alone() {
        let mut facts = open();
        let open = leaks(&mut facts);
        open.journal = Fact::new("t", Ok(vec![disk(DATA)]));
        open.logs = Fact::new("t", Ok(vec![disk(DATA)]));
        open.tmp = Fact::new("t", Ok(vec![disk(DATA)]));
        assert!(judge(&facts).starts_with("pass"), "{}", judge(&facts));
        assert_eq!(texts(&facts), (vec![], String::new()));
    }

    #[test]
    fn the_operators_choices_are_not_fought() {
        let mut later = open();
        let file = "/etc/systemd/journald.conf.d/zzz.conf";
        let changed = Timestamp::UNIX_EPOCH;
        let keep = Setting { value: "persistent".into(), file: file.into(), changed };
        leaks(&mut later).storage = Fact::new("t", Ok(Some(keep)));
        assert!(texts(&later).1.contains(file), "{:?}", texts(&later));

        let mut masked = open();
        let unit = Unit { load_state: "masked".into(), ..unit("", &[]) };
        leaks(&mut masked).tmp_unit = Fact::new("t", Ok(unit));
        assert!(texts(&masked).1.contains("unmask tmp.mount"));

        let mut mounted = open();
        let mount = Mount {
            device: DevNum { major: 259, minor: 5 },
            root: "/".into(),
            mount_point: "/tmp".into(),
            fs_type: "ext4".into(),
            options: vec![],
            read_only: false,
        };
        leaks(&mut mounted).tmp_mounts = Fact::new("t", Ok(vec![mount]));
        let (steps, why) = texts(&mounted);
        assert!(why.contains("/tmp is mounted") && !steps.contains(&"start tmp.mount".into()));
    }

    #[test]
    fn a_log_driver_may_not_lead_to_another_place_on_this_host() {
        let table = [
            ("json-file", None, true),
            ("journald", None, true),
            ("awslogs", None, true),
            ("syslog", None, true),
            ("syslog", Some("unixgram:///dev/log"), true),
            ("syslog", Some("unix:///run/mine.socket"), false),
            ("syslog", Some("udp://127.0.0.1:514"), false),
            ("syslog", Some("tcp://[::1]:514"), false),
            ("syslog", Some("tcp://:514"), false),
            ("syslog", Some("tcp+tls://logs.example.com:6514"), true),
            ("syslog", Some("tcp://[2001:db8::1]:514"), true),
            ("syslog", Some("nonsense"), false),
            ("grafana/loki-docker-driver:latest", None, false),
        ];
        for (name, address, ok) in table {
            let mut facts = shut();
            let driver = LogDriver {
                name: name.into(),
                syslog_address: address.map(str::to_owned),
                by: "/etc/docker/daemon.json".into(),
            };
            leaks(&mut facts).driver = Fact::new("t", Ok(driver));
            let text = judge(&facts);
            assert_eq!(text.starts_with("pass"), ok, "{name} {address:?}: {text}");
            // The file is the operator's: nothing is done about it.
            let (steps, why) = texts(&facts);
            assert!(steps.is_empty() && why.is_empty() == ok, "{name}: {steps:?} {why}");
        }
    }

    #[test]
    fn an_unknown_fact_never_passes() {
        fn hidden<T>() -> Fact<T> {
            Fact::new("t", Err(anyhow!("x")))
        }
        let all: [fn(&mut Facts); 13] = [
            |f| f.root = hidden(),
            |f| f.attached = hidden(),
            |f| leaks(f).journal = hidden(),
            |f| leaks(f).logs = hidden(),
            |f| leaks(f).storage = hidden(),
            |f| leaks(f).forward = hidden(),
            |f| leaks(f).journald = hidden(),
            |f| leaks(f).held = hidden(),
            |f| leaks(f).syslog = hidden(),
            |f| leaks(f).journal_reader = hidden(),
            |f| leaks(f).tmp = hidden(),
            |f| leaks(f).tmp_unit = hidden(),
            |f| leaks(f).driver = hidden(),
        ];
        for (i, hide) in all.into_iter().enumerate() {
            let mut facts = shut();
            hide(&mut facts);
            assert!(judge(&facts).starts_with("unknown"), "case {i}: {}", judge(&facts));
            let plan = RootVolume.plan(&config(RootEncryption::Warn), &facts);
            assert!(plan.is_err(), "case {i}: {plan:?}");
        }
    }
}

//! Tests: facts and verdicts, facts and plans.

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
        sequence: None,
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
    let driver = LogDriver { name: "json-file".into(), syslog_address: None, by: "default".into() };
    let leaks = Leaks {
        storage: Fact::new("t", Ok(None)),
        forward: Fact::new("t", Ok(None)),
        journald: Fact::new("t", Ok(unit("/usr/lib/j", &[]))),
        held: Fact::new("t", Ok(vec![held])),
        syslog: Fact::new("t", Ok(unit("/usr/lib/rsyslog.service", &["multi-user.target"]))),
        journal_reader: Fact::new("t", Ok(None)),
        tmp_mounts: Fact::new("t", Ok(vec![])),
        tmp_unit: Fact::new("t", Ok(unit("", &[]))),
        driver: Fact::new("t", Ok(driver)),
    };
    let attached = vec![volume(ROOT, Some(false)), volume(DATA, Some(true))];
    Facts { leaks: Some(leaks), ..everything_on(&[disk(ROOT)], attached) }
}

/// A system that is all on these, and was looked at no further.
fn everything_on(layers: &[Ground], attached: Vec<AttachedVolume>) -> Facts {
    let on = || Fact::new("t", Ok(layers.to_vec()));
    Facts {
        root: on(),
        var: on(),
        logs: on(),
        journal: on(),
        tmp: on(),
        var_tmp: on(),
        attached: Fact::new("t", Ok(attached)),
        leaks: None,
    }
}

/// The same, put right.
fn shut() -> Facts {
    let mut facts = open();
    let leaks = facts.leaks.as_mut().unwrap();
    leaks.storage = setting("volatile", STARTED - 1);
    leaks.forward = setting("no", STARTED - 1);
    leaks.held = Fact::new("t", Ok(vec![]));
    leaks.tmp_unit = Fact::new("t", Ok(unit("/usr/lib/tmp.mount", &[LOCAL_FS])));
    facts.tmp = Fact::new("t", Ok(memory()));
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
        let facts = everything_on(&layers, volumes);
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

type Way = fn(&mut Facts);

/// A root volume that is encrypted, and one place on a plain volume of its own.
fn apart(place: fn(&mut Facts) -> &mut Fact<Vec<Ground>>) -> Facts {
    let attached = vec![volume(ROOT, Some(true)), volume(DATA, Some(false))];
    let leaks = open().leaks;
    let mut facts = Facts { leaks, ..everything_on(&[disk(ROOT)], attached) };
    *place(&mut facts) = Fact::new("t", Ok(vec![disk(DATA)]));
    facts
}

#[test]
fn a_plain_volume_of_the_logs_own_is_judged_as_a_plain_root_volume() {
    use RootEncryption::{Allow, Require, Warn};
    type Place = fn(&mut Facts) -> &mut Fact<Vec<Ground>>;
    let table: [(&str, Place); 5] = [
        ("/var", |f| &mut f.var),
        ("/var/log", |f| &mut f.logs),
        ("/var/log/journal", |f| &mut f.journal),
        ("/tmp", |f| &mut f.tmp),
        ("/var/tmp", |f| &mut f.var_tmp),
    ];
    for (path, place) in table {
        let facts = apart(place);
        let said = format!("{path} is on {DATA}, which is not encrypted");
        assert_eq!(judge_as(Require, &facts), format!("fail: {said}"));
        let plan = RootVolume.plan(&config(Require), &facts).unwrap();
        assert!(matches!(plan, Plan::Refuse { .. }), "{path}: {plan:?}");
        for policy in [Warn, Allow] {
            let blind = Facts { leaks: None, ..apart(place) };
            assert!(judge_as(policy, &blind).starts_with("unknown"), "{path}");
            assert!(RootVolume.plan(&config(policy), &blind).is_err(), "{path}");
            let told = judge_as(policy, &facts);
            let leaks = ["/var/log", "/var/log/journal", "/tmp"].contains(&path);
            let word = if leaks { "fail: " } else { "pass: " };
            assert!(told.starts_with(word) && told.contains(&said), "{path}: {told}");
            assert_eq!(told.contains("WARNING"), !leaks && policy == Warn, "{told}");
        }
        assert_eq!(texts(&facts).0.is_empty(), ["/var", "/var/tmp"].contains(&path), "{path}");
    }
    // What is plain is named once, and the root volume first.
    let attached = vec![volume(ROOT, Some(false)), volume(DATA, Some(false))];
    let mut both = everything_on(&[disk(ROOT)], attached);
    both.logs = Fact::new("t", Ok(vec![disk(DATA)]));
    both.journal = Fact::new("t", Ok(vec![disk(DATA)]));
    assert_eq!(
        judge_as(Require, &both),
        format!(
            "fail: the root volume {ROOT} is not encrypted, and /var/log is on {DATA}, \
                 which is not encrypted"
        )
    );
}

#[test]
fn what_an_encrypted_root_has_beneath_tmp_is_no_way_to_the_disk() {
    let mut facts = apart(|f| &mut f.logs);
    facts.leaks = shut().leaks;
    facts.tmp = Fact::new("t", Ok(memory()));
    // Whether tmpfs comes back does not matter: what is there otherwise is encrypted.
    leaks(&mut facts).tmp_unit = Fact::new("t", Ok(unit("", &[])));
    assert!(judge(&facts).starts_with("pass"), "{}", judge(&facts));
    assert_eq!(texts(&facts), (vec![], String::new()));
}

#[test]
fn what_is_not_there_yet_rests_on_what_is_above() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let told = |path: &Path| beneath(path).map_err(|e| format!("{e:#}"));
    assert_eq!(told(&dir.path().join("none/at/all")), told(dir.path()));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/no/such/place", &link).unwrap();
    assert!(told(&link).unwrap_err().contains("leads nowhere"));
}

#[test]
fn every_way_to_the_disk_fails_by_itself() {
    assert!(judge(&shut()).starts_with("pass"), "{}", judge(&shut()));
    assert_eq!(texts(&shut()), (vec![], String::new()));
    let open_ways: [(&str, Way); 12] = [
        ("persistent", |f| leaks(f).storage = Fact::new("t", Ok(None))),
        ("persistent", |f| leaks(f).storage = setting("auto", 0)),
        ("persistent", |f| leaks(f).storage = setting("persistent", 0)),
        ("journald writes", |f| leaks(f).held = open().leaks.unwrap().held),
        ("longer than", |f| leaks(f).storage = setting("none", STARTED + 1)),
        ("forwards", |f| leaks(f).forward = Fact::new("t", Ok(None))),
        ("forwards", |f| leaks(f).forward = setting("yes", 0)),
        ("rsyslog reads", |f| {
            leaks(f).journal_reader = Fact::new("t", Ok(Some("/etc/r".into())));
        }),
        ("/tmp is there", |f| f.tmp = Fact::new("t", Ok(vec![disk(ROOT)]))),
        ("next boot", |f| leaks(f).tmp_unit = Fact::new("t", Ok(unit("", &[LOCAL_FS])))),
        ("next boot", |f| leaks(f).tmp_unit = Fact::new("t", Ok(unit("/x", &["a.service"])))),
        ("log driver", |f| {
            let driver = LogDriver { name: "x/y".into(), syslog_address: None, by: "f".into() };
            leaks(f).driver = Fact::new("t", Ok(driver));
        }),
    ];
    for (expected, way) in open_ways {
        let mut facts = shut();
        way(&mut facts);
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
    facts.journal = Fact::new("t", Ok(vec![disk(DATA)]));
    facts.logs = Fact::new("t", Ok(vec![disk(DATA)]));
    facts.tmp = Fact::new("t", Ok(vec![disk(DATA)]));
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
    let all: [fn(&mut Facts); 15] = [
        |f| f.root = hidden(),
        |f| f.attached = hidden(),
        |f| f.var = hidden(),
        |f| f.journal = hidden(),
        |f| f.logs = hidden(),
        |f| f.tmp = hidden(),
        |f| f.var_tmp = hidden(),
        |f| leaks(f).storage = hidden(),
        |f| leaks(f).forward = hidden(),
        |f| leaks(f).journald = hidden(),
        |f| leaks(f).held = hidden(),
        |f| leaks(f).syslog = hidden(),
        |f| leaks(f).journal_reader = hidden(),
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

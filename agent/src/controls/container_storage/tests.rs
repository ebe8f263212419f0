use super::*;
use anyhow::anyhow;

const DATA: DevNum = DevNum { major: 259, minor: 1 };
const ROOT: DevNum = DevNum { major: 254, minor: 1 };
const NONE: DevNum = DevNum { major: 0, minor: 50 };
const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn known<T>(value: T) -> Fact<T> {
    Fact::new("t", Ok(value))
}

fn unknown<T>() -> Fact<T> {
    Fact::new("t", Err(anyhow!("EIO")))
}

fn part(role: Role, devices: &[DevNum]) -> Part {
    Part { role, path: format!("/var/lib/docker/overlay2/{role:?}"), devices: devices.into() }
}

fn mount(at: &str, source: &str, device: DevNum) -> Kept {
    Kept {
        at: at.into(),
        source: source.into(),
        device,
        fs_type: "ext4".into(),
        read_only: false,
        parts: vec![],
    }
}

/// A container as Docker runs it: its layers, its own files, a volume and a directory of `/data`.
fn container() -> Container {
    let overlay = Kept {
        fs_type: "overlay".into(),
        parts: [Role::Lower, Role::Upper, Role::Work].map(|role| part(role, &[DATA])).into(),
        ..mount("/", "/ of overlay", NONE)
    };
    Container {
        id: ID.into(),
        name: Some("writer".into()),
        mounts: vec![
            overlay,
            mount("/etc/hosts", "/data/docker/containers/0/hosts", DATA),
            mount("/etc/localtime", "/usr/share/zoneinfo/Etc/UTC", ROOT),
            mount("/records", "/data/docker/volumes/records/_data", DATA),
            mount("/scratch", "/data/scratch", DATA),
        ],
    }
}

fn good() -> Facts {
    let account = Account {
        version: "26.1".into(),
        root: "/var/lib/docker".into(),
        driver: "overlay2".into(),
        in_containerd: false,
    };
    let directory =
        |daemon, path: &str| Directory { daemon, path: path.into(), device: Some(DATA) };
    Facts {
        device: known(crate::host::device::example(DATA)),
        containers: known(vec![container()]),
        allowed: known(vec!["/etc/localtime".into(), "/usr/share/zoneinfo".into()]),
        account: known(Some(account)),
        directories: known(vec![
            directory(DOCKER, "/var/lib/docker"),
            directory(CONTAINERD, "/var/lib/containerd"),
        ]),
    }
}

fn judge(facts: &Facts) -> String {
    match ContainerStorage.judge(&Config::default(), facts) {
        Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
        Err(Unknown(why)) => format!("unknown: {why}"),
    }
}

/// The same with the container changed.
fn with(change: impl FnOnce(&mut Container)) -> String {
    let mut facts = good();
    let mut container = container();
    change(&mut container);
    facts.containers = known(vec![container]);
    judge(&facts)
}

#[test]
fn containers_on_the_volume_pass() {
    assert_eq!(
        judge(&good()),
        "pass: the 1 container that runs writes to vol-0123456789abcdef0 alone; Docker keeps \
         layers in /var/lib/docker (overlay2)"
    );
    let mut facts = good();
    facts.containers = known(vec![]);
    facts.account = known(None);
    facts.directories = known(vec![]);
    assert_eq!(judge(&facts), "pass: no container runs; Docker does not run");
    let mut facts = good();
    if let crate::control::Seen::Value(Some(account)) = &mut facts.account.seen {
        account.driver = "overlayfs".into();
        account.in_containerd = true;
    }
    assert!(judge(&facts).ends_with("layers in containerd (overlayfs)"), "{}", judge(&facts));
}

#[test]
fn what_is_mounted_from_elsewhere_fails_and_is_named() {
    let bind = |source: &str, device| with(|c| c.mounts.push(mount("/zz", source, device)));
    assert_eq!(
        bind("/srv/records", ROOT),
        "fail: container writer (0123456789ab) has /srv/records mounted on /zz, which is on the \
         device 254:1"
    );
    // Another disk, no disk at all, and what only begins like something allowed.
    assert!(bind("/mnt/other", DevNum { major: 259, minor: 2 }).starts_with("fail"));
    assert!(bind("/usr/share/zoneinfo2", ROOT).starts_with("fail"));
    let nfs = with(|c| {
        c.mounts.push(Kept { fs_type: "nfs4".into(), ..mount("/n", "/ of server:/e", NONE) });
    });
    assert!(nfs.starts_with("fail") && nfs.ends_with("on /n, which is nfs4"), "{nfs}");
    let host = with(|c| {
        c.name = None;
        c.mounts.push(Kept { read_only: true, ..mount("/host", "/", ROOT) });
        c.mounts.push(mount("/host/boot/efi", "/boot/efi", DevNum { major: 254, minor: 15 }));
    });
    assert_eq!(
        host,
        "fail: container 0123456789ab has / mounted on /host, read-only, which is on the device \
         254:1"
    );
    // Many are counted.
    let many = with(|c| {
        for i in 0..6 {
            c.mounts.push(mount(&format!("/m{i}"), &format!("/srv/{i}"), ROOT));
        }
    });
    assert!(many.ends_with("; and 2 more"), "{many}");
}

#[test]
fn every_layer_counts() {
    for role in [Role::Upper, Role::Work, Role::Lower] {
        let off = |devices: &[DevNum]| {
            with(|c| {
                for part in c.mounts[0].parts.iter_mut().filter(|part| part.role == role) {
                    part.devices = devices.into();
                }
            })
        };
        assert!(off(&[ROOT]).starts_with("fail: container writer"), "{}", off(&[ROOT]));
        assert!(off(&[DATA, ROOT]).starts_with("fail"), "one of the two places it may be");
        assert!(off(&[]).starts_with("unknown: container writer"), "{}", off(&[]));
    }
    assert!(with(|c| c.mounts[0].parts.clear()).starts_with("unknown"));
    // No overlay's device number says anything, not even the right one.
    let own = with(|c| {
        c.mounts[0].device = DATA;
        c.mounts[0].parts[1].devices = vec![ROOT];
    });
    assert!(own.starts_with("fail"), "{own}");
    // What is wrong is not hidden by what is not known.
    let both = with(|c| {
        c.mounts[0].parts[0].devices.clear();
        c.mounts.push(mount("/zz", "/srv", ROOT));
    });
    assert!(both.starts_with("fail"), "{both}");
}

#[test]
fn what_is_allowed_is_so_with_all_below_and_the_root_alone() {
    let allowed = ["/".to_owned(), "/etc/ssl/certs".to_owned()];
    let table = [
        ("/", true),
        ("/etc", false),
        ("/etc/ssl/certs", true),
        ("/etc/ssl/certs/a.pem", true),
        ("/etc/ssl/certs2", false),
        ("/etc/ssl/certs//deleted", true),
        ("/ of server:/e", false),
        ("", false),
    ];
    for (source, is) in table {
        assert_eq!(is_allowed(source, &allowed), is, "{source}");
    }
}

#[test]
fn a_daemon_that_keeps_its_data_elsewhere_fails() {
    let mut facts = good();
    let directory = |device| Directory { daemon: DOCKER, path: "/mnt/docker".into(), device };
    facts.directories = known(vec![directory(Some(ROOT))]);
    assert_eq!(
        judge(&facts),
        "fail: docker.service keeps its data in /mnt/docker, on the device 254:1"
    );
    facts.directories = known(vec![directory(None)]);
    assert!(judge(&facts).starts_with("unknown: docker.service sees no"), "{}", judge(&facts));
}

type Break = fn(&mut Facts);

#[test]
fn what_is_not_known_never_passes() {
    let table: [Break; 5] = [
        |f| f.device = unknown(),
        |f| f.containers = unknown(),
        |f| f.allowed = unknown(),
        |f| f.account = unknown(),
        |f| f.directories = unknown(),
    ];
    for (i, break_it) in table.into_iter().enumerate() {
        let mut facts = good();
        break_it(&mut facts);
        assert!(judge(&facts).starts_with("unknown: EIO"), "case {i}: {}", judge(&facts));
        assert!(ContainerStorage.plan(&Config::default(), &facts).is_err(), "case {i}");
    }
}

#[test]
fn a_daemon_that_hangs_hides_nothing() {
    let mut facts = good();
    facts.account = Fact::new("t", Err(anyhow!("no answer within 5 s")));
    assert_eq!(
        judge(&facts),
        "unknown: no answer within 5 s; by the kernel's account, the 1 container that runs writes \
         to vol-0123456789abcdef0 alone"
    );
    let mut bad = container();
    bad.mounts.push(mount("/zz", "/srv", ROOT));
    facts.containers = known(vec![bad]);
    assert!(judge(&facts).starts_with("fail: container writer"), "{}", judge(&facts));
}

#[test]
fn no_container_is_touched() {
    let mut facts = good();
    assert_eq!(ContainerStorage.plan(&Config::default(), &facts), Ok(Plan::Nothing));
    let mut bad = container();
    bad.mounts.push(mount("/zz", "/srv", ROOT));
    facts.containers = known(vec![bad]);
    let plan = ContainerStorage.plan(&Config::default(), &facts);
    assert!(matches!(plan, Ok(Plan::Refuse { .. })), "{plan:?}");
}

#[test]
fn a_daemon_on_its_way_is_not_one_that_does_not_run() {
    let of = |state: &str, main_pid| {
        let unit = Unit { active_state: state.into(), main_pid, ..Unit::default() };
        main_process("docker.service", &unit).map_err(|e| e.to_string())
    };
    assert_eq!(of("active", 7), Ok(Some(7)));
    for state in ["reloading", "deactivating", "activating"] {
        assert_eq!(of(state, 7), Err(format!("docker.service is {state}")));
    }
    for state in ["reloading", "active"] {
        assert_eq!(of(state, 0), Err(format!("docker.service is {state}")), "by whom?");
    }
    for state in ["inactive", "failed", "activating", "deactivating"] {
        assert_eq!(of(state, 0), Ok(None), "{state}");
    }
}

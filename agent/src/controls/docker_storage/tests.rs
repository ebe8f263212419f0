use super::*;
use crate::config::Migrate;
use crate::host::dockerd::Written;
use crate::host::migration::Left;
use crate::host::tree::Usage;
use anyhow::anyhow;

const DATA: DevNum = DevNum { major: 259, minor: 1 };
const ROOT: DevNum = DevNum { major: 254, minor: 0 };

fn unit(active: &str, enabled: &str) -> Unit {
    Unit {
        load_state: "loaded".into(),
        active_state: active.into(),
        unit_file_state: enabled.into(),
        main_pid: u32::from(active == "active") * 7,
        requires: STORAGE.map(|(path, _)| unit_name(Path::new(path), "mount")).into(),
        after: STORAGE.map(|(path, _)| unit_name(Path::new(path), "mount")).into(),
        ..Unit::default()
    }
}

fn held(name: &str, device: DevNum) -> HeldFile {
    HeldFile { path: format!("/var/lib/{name}/meta.db"), device }
}

fn found(old: Storage) -> Found {
    Found {
        old,
        link: None,
        outside: None,
        old_mark: None,
        new: Some(Storage::Absent),
        new_mark: None,
        incoming: false,
        left: None,
        others: vec![],
    }
}

/// Docker with data on the root disk, and a volume that it fits on.
fn used() -> Facts {
    let mut facts = fresh();
    let data = Storage::Used("/var/lib/docker/volumes/v".into());
    facts.directories[0].data = Fact::new("t", Ok(found(data)));
    facts.space = space(1, 8);
    facts
}

fn space(needed: u64, free: u64) -> Fact<Option<Space>> {
    let usage = |gib: u64| Usage { bytes: gib << 30, inodes: gib * 100_000 };
    Fact::new("t", Ok(Some(Space { needed: usage(needed), free: usage(free) })))
}

/// A fresh host on which Docker has started on the root disk.
fn fresh() -> Facts {
    let directory = |(path, source)| Directory {
        path,
        source,
        mounts: Fact::new("t", Ok(vec![])),
        data: Fact::new("t", Ok(found(Storage::Unused))),
        hidden: Fact::new("t", Ok(None)),
        unit_file: Fact::new("t", Ok(None)),
        unit: Fact::new("t", Ok(Unit { load_state: "not-found".into(), ..Unit::default() })),
    };
    let daemon = |name: &'static str| Daemon {
        name,
        unit: Fact::new("t", Ok(unit("active", "enabled"))),
        held: Fact::new("t", Ok(Some(vec![held(name, ROOT)]))),
    };
    Facts {
        device: Fact::new("t", Ok(crate::host::device::example(DATA))),
        gate: Fact::new("t", Err(anyhow!("nothing is mounted on /data"))),
        directories: STORAGE.map(directory).into(),
        containers: Fact::new("t", Ok(vec![])),
        space: Fact::new("t", Ok(None)),
        daemons: DAEMONS.map(daemon).into(),
        socket: Fact::new("t", Ok(unit("active", "enabled"))),
        at_start: Fact::new("t", Ok(None)),
        off_volume: Fact::new("t", Ok(None)),
        snap: Fact::new("t", Ok(None)),
    }
}

fn ready() -> Facts {
    let mut facts = fresh();
    facts.gate = Fact::new("t", Ok("open".into()));
    for directory in &mut facts.directories {
        let path = unit_path(&unit_name(Path::new(directory.path), "mount"));
        directory.mounts = Fact::new(
            "t",
            Ok(vec![Mount {
                device: DATA,
                root: format!("/{}", directory.source),
                mount_point: directory.path.into(),
                fs_type: "ext4".into(),
                options: vec![],
                read_only: false,
            }]),
        );
        directory.unit_file = Fact::new("t", Ok(Some(directory.unit_content(&Config::default()))));
        directory.unit = Fact::new(
            "t",
            Ok(Unit { fragment_path: path.display().to_string(), ..unit("active", "static") }),
        );
    }
    for daemon in &mut facts.daemons {
        daemon.held = Fact::new("t", Ok(Some(vec![held(daemon.name, DATA)])));
    }
    facts
}

fn judge(facts: &Facts) -> String {
    match DockerStorage.judge(&Config::default(), facts) {
        Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
        Err(Unknown(why)) => format!("unknown: {why}"),
    }
}

fn plan(facts: &Facts) -> Vec<String> {
    match DockerStorage.plan(&Config::default(), facts) {
        Ok(Plan::Steps(steps)) => steps.iter().map(ToString::to_string).collect(),
        Ok(Plan::Nothing) => vec![],
        Ok(Plan::Refuse { why } | Plan::Contain { why, .. }) => vec![format!("refuse: {why}")],
        Err(Unknown(why)) => vec![format!("unknown: {why}")],
    }
}

#[test]
fn a_ready_host_passes_and_needs_nothing() {
    assert!(judge(&ready()).starts_with("pass"), "{}", judge(&ready()));
    assert_eq!(plan(&ready()), Vec::<String>::new());
}

#[test]
fn docker_stands_still_while_its_storage_moves() {
    assert_eq!(
        plan(&fresh()),
        [
            "stop Docker and containerd",
            "make the directory /data/docker (mode 0711)",
            "write /etc/systemd/system/var-lib-docker.mount",
            "make the directory /data/containerd (mode 0711)",
            "write /etc/systemd/system/var-lib-containerd.mount",
            "start var-lib-docker.mount",
            "start var-lib-containerd.mount",
            "start containerd.service",
            "start docker.service",
        ]
    );
}

#[test]
fn docker_is_started_only_through_an_open_gate() {
    let mut mounted = ready();
    for daemon in &mut mounted.daemons {
        daemon.unit = Fact::new("t", Ok(unit("inactive", "enabled")));
        daemon.held = Fact::new("t", Ok(None));
    }
    assert_eq!(plan(&mounted), ["start containerd.service", "start docker.service"]);
    mounted.gate = Fact::new("t", Err(anyhow!("daemon.json sets data-root")));
    assert!(plan(&mounted)[0].starts_with("refuse: the gate is closed"));
}

#[test]
fn docker_is_started_once_with_what_is_asked_of_it() {
    let written = Written {
        path: "/etc/docker/daemon.json".into(),
        settings: std::collections::BTreeMap::default(),
        changed: None,
    };
    let mut facts = fresh();
    facts.at_start = Fact::new("t", Ok(Some(AtStart { flags: vec![], written, swarm: false })));
    facts.socket = Fact::new("t", Ok(unit("inactive", "enabled")));
    let steps = plan(&facts);
    let of_docker: Vec<_> = steps.iter().filter(|step| step.contains("start docker.")).collect();
    assert!(of_docker.len() == 1 && of_docker[0].starts_with("in Docker's configuration, set"));
    assert_eq!(steps.last(), Some(of_docker[0]));
    // What is not known is not changed, and keeps nothing from its place.
    facts.at_start = Fact::new("t", Err(anyhow!("EIO")));
    assert_eq!(plan(&facts).last().map(String::as_str), Some("start docker.service"));
}

type Break = fn(&mut Facts);

#[test]
fn anything_off_the_volume_fails() {
    let cases: [(&str, Break); 12] = [
        ("unknown", |f| f.snap = Fact::new("t", Err(anyhow!("EIO")))),
        ("fail", |f| f.snap = Fact::new("t", Ok(Some("/snap/docker".into())))),
        ("fail", |f| f.gate = Fact::new("t", Err(anyhow!("daemon.json sets data-root")))),
        ("fail", |f| {
            f.daemons[1].unit =
                Fact::new("t", Ok(Unit { after: vec![], ..unit("active", "enabled") }));
        }),
        ("fail", |f| f.directories[0].mounts = Fact::new("t", Ok(vec![]))),
        ("fail", |f| f.directories[1].mounts = Fact::new("t", Ok(vec![]))),
        ("fail", |f| f.daemons[0].held = Fact::new("t", Ok(Some(vec![held("x", ROOT)])))),
        ("fail", |f| {
            f.daemons[1].held = Fact::new("t", Ok(Some(vec![held("x", DATA), held("y", ROOT)])));
        }),
        ("fail", |f| f.daemons[1].unit = Fact::new("t", Ok(unit("failed", "enabled")))),
        ("fail", |f| f.directories[0].unit_file = Fact::new("t", Ok(None))),
        ("unknown", |f| f.daemons[0].held = Fact::new("t", Ok(Some(vec![])))),
        ("unknown", |f| f.daemons[1].held = Fact::new("t", Err(anyhow!("EACCES")))),
    ];
    for (i, (expected, break_it)) in cases.into_iter().enumerate() {
        let mut facts = ready();
        break_it(&mut facts);
        assert!(judge(&facts).starts_with(expected), "case {i}: {}", judge(&facts));
    }
}

#[test]
fn a_daemon_that_started_before_the_mount_is_restarted() {
    let mut facts = ready();
    facts.daemons[1].held = Fact::new("t", Ok(Some(vec![held("docker", ROOT)])));
    let steps = plan(&facts);
    assert_eq!(steps.first().map(String::as_str), Some("stop Docker and containerd"));
    assert_eq!(steps.last().map(String::as_str), Some("start docker.service"));
}

#[test]
fn a_daemon_that_is_told_to_write_elsewhere_is_stopped_and_not_started() {
    let mut facts = ready();
    let file = HeldFile { path: "/mnt/x/volumes/metadata.db".into(), device: ROOT };
    facts.daemons[1].held = Fact::new("t", Ok(Some(vec![held("docker", DATA), file])));
    assert!(judge(&facts).starts_with("fail"));
    let plan = DockerStorage.plan(&Config::default(), &facts).unwrap();
    assert!(matches!(plan, Plan::Contain { steps, .. } if steps == [Step::StopDocker]));
}

#[test]
fn a_daemon_whose_command_line_leads_off_the_volume_is_not_started() {
    let what = "the command line of docker.service has --data-root /srv/docker";
    let told = || Fact::new("t", Ok(Some(what.to_owned())));
    // Down, on a host where all else is in place.
    let mut facts = ready();
    for daemon in &mut facts.daemons {
        daemon.unit = Fact::new("t", Ok(unit("inactive", "enabled")));
        daemon.held = Fact::new("t", Ok(None));
    }
    facts.off_volume = told();
    assert_eq!(judge(&facts), format!("fail: {what}"));
    let refused = plan(&facts);
    assert!(refused.len() == 1 && refused[0].starts_with("refuse: Docker is not started: "));
    assert!(refused[0].contains(what), "{refused:?}");
    // Its socket would start it.
    facts.daemons[1].unit = Fact::new("t", Ok(unit("inactive", "disabled")));
    facts.socket = Fact::new("t", Ok(unit("inactive", "enabled")));
    assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));
    // It runs on the volume, and would not after the next boot.
    let mut facts = ready();
    facts.off_volume = told();
    assert_eq!(judge(&facts), format!("fail: {what}"));
    let refused = DockerStorage.plan(&Config::default(), &facts);
    assert!(matches!(refused, Ok(Plan::Refuse { .. })), "{refused:?}");
    // It runs where nothing is mounted yet, and there.
    let mut facts = fresh();
    facts.off_volume = told();
    let contained = DockerStorage.plan(&Config::default(), &facts);
    assert!(matches!(contained, Ok(Plan::Contain { steps, .. }) if steps == [Step::StopDocker]));
    // What is not known starts nothing, and is not called good.
    let mut facts = ready();
    facts.off_volume = Fact::new("t", Err(anyhow!("EIO")));
    assert!(judge(&facts).starts_with("unknown") && plan(&facts)[0].starts_with("unknown"));
}

#[test]
fn somebodys_data_is_never_hidden() {
    for storage in [Storage::Symlink("/data/docker".into()), Storage::NotADirectory] {
        let mut facts = fresh();
        facts.directories[0].data = Fact::new("t", Ok(found(storage)));
        assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));
    }
    let mut facts = fresh();
    facts.directories[0].data = Fact::new("t", Err(anyhow!("EIO")));
    assert!(plan(&facts)[0].starts_with("unknown"));
}

/// A link in the place of `/var/lib/docker`, and what is behind it.
fn linked(leads: Leads, old: Storage) -> Facts {
    let mut facts = fresh();
    let link = Some(Link { target: "/srv/docker".into(), leads });
    facts.directories[0].data = Fact::new("t", Ok(Found { link, ..found(old) }));
    facts.space = space(1, 8);
    facts
}

#[test]
fn a_link_gives_way_to_a_directory() {
    let data = || Storage::Used("/srv/docker/volumes/v".into());
    let replace = "make /var/lib/docker a directory instead of a link";
    let facts = linked(Leads::Beside("/srv/docker".into()), data());
    assert_eq!(
        judge(&facts),
        "fail: /var/lib/docker is a link to /srv/docker, and not on the volume by a mount"
    );
    let steps = plan(&facts);
    assert_eq!(steps[..2], ["stop Docker and containerd", replace], "{steps:?}");
    assert!(steps[2].starts_with("move the data of /var/lib/docker"), "{steps:?}");
    // Where it leads to the right place nothing is moved, and nothing erased.
    let steps = plan(&linked(Leads::Home, Storage::Absent));
    assert_eq!(steps[..2], ["stop Docker and containerd", replace], "{steps:?}");
    assert!(!steps.iter().any(|step| step.contains("move the data")), "{steps:?}");
    assert!(steps.contains(&"start var-lib-docker.mount".to_owned()), "{steps:?}");
    assert!(!steps.iter().any(|step| step.contains("overwrite")), "{steps:?}");
    // Nothing of what containers use is pulled away from under them.
    for leads in [Leads::Home, Leads::Beside("/srv/docker".into())] {
        let mut facts = linked(leads.clone(), Storage::Absent);
        facts.containers = Fact::new("t", Ok(vec!["0123456789abcdef".into()]));
        let steps = plan(&facts);
        assert!(steps.len() == 1 && steps[0].contains("containers run ("), "{steps:?}");
        facts.containers = Fact::new("t", Err(anyhow!("EIO")));
        assert!(plan(&facts)[0].starts_with("unknown"), "{:?}", plan(&facts));
    }
    let refused = plan(&linked(Leads::Elsewhere("on another mount".into()), data()));
    assert!(refused.len() == 1 && refused[0].starts_with("refuse"), "{refused:?}");
    let never = DockerStorage
        .plan(&config(Migrate::Never), &linked(Leads::Beside("/srv/docker".into()), data()));
    assert!(matches!(never, Ok(Plan::Refuse { .. })), "{never:?}");
}

#[test]
fn docker_as_a_snap_is_refused() {
    let mut facts = fresh();
    facts.snap = Fact::new("t", Ok(Some("snap.docker.dockerd.service".into())));
    assert!(judge(&facts).starts_with("fail: Docker is installed as a snap"), "{}", judge(&facts));
    assert!(plan(&facts)[0].starts_with("refuse: Docker is a snap"), "{:?}", plan(&facts));
    facts.snap = Fact::new("t", Err(anyhow!("EIO")));
    assert!(judge(&facts).starts_with("unknown") && plan(&facts)[0].starts_with("unknown"));
}

#[test]
fn data_is_moved_before_anything_is_mounted_and_erased_after_docker_has_come_up() {
    assert!(judge(&used()).starts_with("fail: /var/lib/docker is on the root disk, and holds"));
    assert_eq!(
        plan(&used()),
        [
            "stop Docker and containerd",
            "move the data of /var/lib/docker to /data/docker on vol-0123456789abcdef0",
            "write /etc/systemd/system/var-lib-docker.mount",
            "make the directory /data/containerd (mode 0711)",
            "write /etc/systemd/system/var-lib-containerd.mount",
            "start var-lib-docker.mount",
            "start var-lib-containerd.mount",
            "start containerd.service",
            "start docker.service",
            "overwrite and remove the old copy \
             /var/lib/.hostagent-migrated-docker-vol-0123456789abcdef0",
        ]
    );
    // A unit from before would mount an unfinished copy at the next boot.
    let mut facts = used();
    let content = facts.directories[0].unit_content(&Config::default());
    facts.directories[0].unit_file = Fact::new("t", Ok(Some(content)));
    facts.directories[0].unit = Fact::new("t", Ok(unit("inactive", "static")));
    let steps = plan(&facts);
    let at = |text: &str| steps.iter().position(|step| step.contains(text));
    let remove = at("remove /etc/systemd/system/var-lib-docker.mount");
    assert!(remove.is_some() && remove < at("move the data"), "{steps:?}");
    assert!(at("move the data") < at("write /etc/systemd/system/var-lib-docker"), "{steps:?}");
}

#[test]
fn what_cannot_be_moved_is_refused_before_anything_stops() {
    let cases: [(&str, Break); 5] = [
        ("containers run (0123456789ab)", |f| {
            f.containers = Fact::new("t", Ok(vec!["0123456789abcdef".into()]));
        }),
        ("does not fit on vol-", |f| f.space = space(8, 8)),
        ("and so does /data/docker", |f| {
            let mut found = f.directories[0].data.known().unwrap().clone();
            found.new = Some(Storage::Used("/data/docker/volumes/v".into()));
            f.directories[0].data = Fact::new("t", Ok(found));
        }),
        ("EIO", |f| f.containers = Fact::new("t", Err(anyhow!("EIO")))),
        ("EIO", |f| f.space = Fact::new("t", Err(anyhow!("EIO")))),
    ];
    for (expected, break_it) in cases {
        let mut facts = used();
        break_it(&mut facts);
        let steps = plan(&facts);
        assert!(steps.len() == 1 && steps[0].contains(expected), "{expected}: {steps:?}");
        assert!(!steps[0].starts_with("stop"), "{steps:?}");
    }
    let never = config(Migrate::Never);
    let refusal = DockerStorage.plan(&never, &used());
    assert!(matches!(refusal, Ok(Plan::Refuse { .. })), "{refusal:?}");
}

fn config(migrate: Migrate) -> Config {
    let docker = crate::config::Docker { migrate, ..crate::config::Docker::default() };
    Config { docker, ..Config::default() }
}

#[test]
fn containers_are_stopped_where_that_is_wanted() {
    let mut facts = used();
    facts.containers = Fact::new("t", Ok(vec!["0123456789abcdef".into()]));
    let Ok(Plan::Steps(steps)) = DockerStorage.plan(&config(Migrate::Running), &facts) else {
        panic!()
    };
    assert_eq!(steps[..2], [Step::StopDocker, Step::StopContainers]);
    assert!(matches!(steps[2], Step::MigrateStorage { .. }));
}

#[test]
fn what_is_left_on_the_root_disk_fails() {
    let left = |mark: &str| {
        let path = "/var/lib/.hostagent-migrated-docker-vol-0123456789abcdef0".into();
        let mut found = found(Storage::Absent);
        found.new = Some(Storage::Used("/data/docker/volumes/v".into()));
        found.new_mark = Some("m".into());
        found.left = Some(Left { path, mark: Some(mark.into()) });
        found
    };
    let mut facts = ready();
    facts.directories[0].data = Fact::new("t", Ok(left("m")));
    assert!(judge(&facts).starts_with("fail: the old copy of /var/lib/docker is still"));
    let steps = plan(&facts);
    assert!(steps.len() == 1 && steps[0].starts_with("overwrite and remove"), "{steps:?}");
    // Not proven to be a copy: not erased.
    facts.directories[0].data = Fact::new("t", Ok(left("n")));
    assert!(judge(&facts).starts_with("fail"), "{}", judge(&facts));
    assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));

    let mut facts = ready();
    let mut other = found(Storage::Absent);
    other.others = vec!["/var/lib/.hostagent-migrated-docker-vol-0ffffffff".into()];
    facts.directories[0].data = Fact::new("t", Ok(other));
    assert!(judge(&facts).contains("another volume"), "{}", judge(&facts));
    assert!(plan(&facts)[0].starts_with("refuse"), "{:?}", plan(&facts));
}

#[test]
fn data_beneath_a_mount_fails_and_is_not_touched() {
    let mut facts = ready();
    let first = "/var/lib/docker/volumes/v";
    facts.directories[0].data = Fact::new("t", Ok(found(Storage::Used(first.into()))));
    let usage = Usage { bytes: 3 << 20, inodes: 7 };
    facts.directories[0].hidden = Fact::new("t", Ok(Some(Hidden { path: first.into(), usage })));
    assert_eq!(
        judge(&facts),
        "fail: beneath the mount on /var/lib/docker the root disk holds data: \
         /var/lib/docker/volumes/v and more, 3.0 MiB in 7 files"
    );
    assert!(plan(&facts)[0].starts_with("refuse: beneath"), "{:?}", plan(&facts));
    facts.directories[0].data = Fact::new("t", Err(anyhow!("EPERM")));
    assert!(judge(&facts).starts_with("unknown"), "what cannot be looked at is not empty");
}

#[test]
fn docker_that_is_not_installed_needs_only_its_place() {
    let mut facts = ready();
    for daemon in &mut facts.daemons {
        daemon.unit = Fact::new(
            "t",
            Ok(Unit {
                load_state: "not-found".into(),
                active_state: "inactive".into(),
                ..Unit::default()
            }),
        );
        daemon.held = Fact::new("t", Ok(None));
    }
    assert!(judge(&facts).starts_with("pass"), "{}", judge(&facts));
}

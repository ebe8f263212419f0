//! The parts that need no container: those that do are shown on an instance.

use super::*;

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

#[test]
fn a_directory_is_named_by_its_path_on_the_host() {
    let (disk, data) = (DevNum { major: 254, minor: 1 }, DevNum { major: 259, minor: 1 });
    let host = Host {
        namespace: "mnt:[1]".into(),
        mounts: vec![
            mount("/", disk, "/"),
            mount("/data", data, "/"),
            mount("/var/lib/docker", data, "/docker"),
            mount("/home", disk, "/@home"),
        ],
        root: None,
    };
    let table = [
        (disk, "/srv/x", Some("/srv/x")),
        (disk, "/", Some("/")),
        (disk, "/@home/a", Some("/@home/a")),
        // Not by the name under which it is mounted once more.
        (data, "/docker/volumes/v", Some("/data/docker/volumes/v")),
        (data, "/docker2", Some("/data/docker2")),
        (DevNum { major: 7, minor: 0 }, "/", None),
    ];
    for (device, root, expected) in table {
        let path = host.path_of(device, Path::new(root));
        assert_eq!(path.as_deref(), expected.map(Path::new), "{root}");
    }
}

#[test]
fn a_link_below_another_root_leads_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    std::os::unix::fs::symlink("/a/b", dir.path().join("link")).unwrap();
    std::os::unix::fs::symlink("/proc", dir.path().join("out")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let here = DevNum::of(fs::metadata(dir.path()).unwrap().dev());
    let at = |path: &str| device_in(dir.path(), Path::new(path)).unwrap();
    assert_eq!(at("/a/b"), Some(here));
    assert_eq!(at("/link"), Some(here));
    assert_eq!(at("/../../a"), Some(here));
    assert_eq!(at("/out"), None);
    assert_eq!(at("/file"), None);
    assert_eq!(at("/none"), None);
    assert_eq!(device_in(Path::new("/proc/0/root"), Path::new("/")).unwrap(), None);
}

/// As a container that is being prepared, and as a process that has left one: the host's own root.
#[test]
fn who_sees_the_hosts_root_is_told_from_who_has_his_own() {
    let host = Host::look().unwrap();
    let pid = i32::try_from(std::process::id()).unwrap();
    let member = Member { pid, container: "c".into(), shim: None };
    let seen = views(&host, std::slice::from_ref(&member)).unwrap();
    assert!(seen.len() == 1 && seen[0].is_outside);
    let elsewhere = Host { namespace: "mnt:[1]".into(), root: None, ..host };
    let seen = views(&elsewhere, &[member.clone(), member.clone()]).unwrap();
    assert!(seen.len() == 1 && !seen[0].is_outside, "one for each namespace");
    // One that is gone is no error.
    let gone = Member { pid: i32::MAX, ..member };
    assert!(views(&elsewhere, &[gone]).unwrap().is_empty());
}

#[test]
fn what_paths_lead_to_is_meant_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    fs::write(path.join("utc"), "").unwrap();
    std::os::unix::fs::symlink("utc", path.join("localtime")).unwrap();
    let text = |name: &str| path.join(name).display().to_string();
    let all = resolved(&[text("localtime"), text("none")]).unwrap();
    assert_eq!(all, [text("localtime"), text("utc"), text("none")]);
}

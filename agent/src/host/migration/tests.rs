//! Every state that an interrupted migration can leave, with real directories, and what becomes of
//! it. Run as root, as CI does: marks are attributes that only root can set.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use anyhow::bail;

use super::moving::ERASING;
use super::*;
use crate::host::tree::{COMPARED, compare};

struct World {
    dir: tempfile::TempDir,
    place: Place,
    device: DevNum,
}

impl World {
    /// Docker with data on the root disk, and an empty volume.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        for sub in ["lib", "data"] {
            fs::create_dir(path.join(sub)).unwrap();
        }
        let place = Place {
            directory: path.join("lib/docker"),
            target: path.join("data/docker"),
            volumes: crate::host::block::VolumeId::parse("vol-0123456789abcdef0").unwrap().into(),
        };
        let device = DevNum::of(fs::metadata(&path).unwrap().dev());
        let world = Self { dir, place, device };
        fill(&world.place.directory);
        fs::set_permissions(&world.place.directory, fs::Permissions::from_mode(0o710)).unwrap();
        world
    }

    fn look(&self) -> Found {
        let above = open_parent(&self.place.directory).unwrap();
        let name = self.place.name().unwrap();
        look_in(&self.place, above.as_fd(), &name, Some(self.device)).unwrap()
    }

    fn next(&self) -> Next {
        self.place.next(&self.look())
    }

    fn run(&self) -> Result<()> {
        migrate(&self.place, self.device, &|_| Ok(()), &Progress::default())
    }

    fn erase(&self) -> Result<()> {
        erase(&self.place, self.device, &|_| Ok(()), &Progress::default())
    }

    /// Expects what is left when all is done: the data on the volume, nothing else anywhere.
    fn expect_done(&self) {
        assert_eq!(self.next(), Next::Nothing);
        self.erase().unwrap();
        assert!(is_whole(&self.place.target));
        assert_eq!(fs::read_dir(&self.place.directory).unwrap().count(), 0);
        let mode = fs::metadata(&self.place.directory).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o710);
        for (place, only) in [("lib", "docker"), ("data", "docker")] {
            let names: Vec<_> = fs::read_dir(self.dir.path().join(place))
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            assert_eq!(names, [only]);
        }
    }
}

/// Something that happens to a world.
type Change = fn(&World);

fn put_mark(path: &Path, mark: &str) {
    set_mark(&File::open(path).unwrap().into(), mark).unwrap();
}

fn fill(directory: &Path) {
    fs::create_dir_all(directory.join("volumes/records/_data")).unwrap();
    for i in 0..5 {
        fs::write(directory.join(format!("volumes/records/_data/{i}")), format!("record {i}"))
            .unwrap();
    }
    fs::create_dir(directory.join("overlay2")).unwrap();
    fs::hard_link(directory.join("volumes/records/_data/1"), directory.join("overlay2/1")).unwrap();
    symlink("../volumes", directory.join("overlay2/link")).unwrap();
    fs::write(directory.join("engine-id"), "x").unwrap();
}

/// Whether a directory holds exactly what [`fill`] made.
fn is_whole(directory: &Path) -> bool {
    let dir = tempfile::tempdir().unwrap();
    fill(&dir.path().join("d"));
    let names = |top: &Path| {
        let mut found = Vec::new();
        let mut todo = vec![top.to_path_buf()];
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            found.push((path.strip_prefix(top).unwrap().to_path_buf(), content));
            if meta.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
        }
        found.sort();
        found
    };
    directory.is_dir() && names(directory) == names(&dir.path().join("d"))
}

/// Not root: the test cannot be made here, and says so.
fn not_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: must be root to mark directories");
    }
    !root
}

#[test]
fn data_is_moved_and_the_old_copy_erased_afterwards() {
    if not_root() {
        return;
    }
    let world = World::new();
    assert_eq!(world.next(), Next::Copy);
    world.run().unwrap();
    assert!(is_whole(&world.place.left()), "the old copy is whole until it is erased");
    world.run().unwrap();
    world.expect_done();
    world.run().unwrap();
    world.expect_done();
}

#[test]
fn an_unfinished_copy_is_made_anew() {
    if not_root() {
        return;
    }
    let world = World::new();
    // Half a copy, with something that is not in the original, and a link to somewhere else.
    fs::create_dir_all(world.place.incoming().join("volumes")).unwrap();
    fs::write(world.place.incoming().join("volumes/half"), "rec").unwrap();
    symlink(&world.place.directory, world.place.incoming().join("link")).unwrap();
    assert!(world.look().incoming);
    assert_eq!(world.next(), Next::Copy);
    // Compared and marked, but not renamed: no different.
    put_mark(&world.place.directory, "m");
    put_mark(&world.place.incoming(), "m");
    assert_eq!(world.next(), Next::Copy);
    world.run().unwrap();
    world.expect_done();
}

#[test]
fn a_cut_between_the_renames_is_finished_after_another_comparison() {
    if not_root() {
        return;
    }
    // The target was not there; and it was a fresh daemon's, exchanged and not yet removed.
    for exchanged in [false, true] {
        let world = World::new();
        world.run().unwrap();
        fs::remove_dir(&world.place.directory).unwrap();
        fs::rename(world.place.left(), &world.place.directory).unwrap();
        if exchanged {
            fs::create_dir(world.place.incoming()).unwrap();
            fs::write(world.place.incoming().join("engine-id"), "y").unwrap();
        }
        assert_eq!(world.next(), Next::Finish);
        world.run().unwrap();
        world.expect_done();
    }
}

/// As if the power had been cut between the two renames.
fn cut_between_the_renames() -> World {
    let world = World::new();
    world.run().unwrap();
    fs::remove_dir(&world.place.directory).unwrap();
    fs::rename(world.place.left(), &world.place.directory).unwrap();
    assert_eq!(world.next(), Next::Finish);
    world
}

#[test]
fn what_was_changed_since_a_copy_is_copied_anew() {
    if not_root() {
        return;
    }
    let world = cut_between_the_renames();
    fs::create_dir(world.place.incoming()).unwrap();
    fs::write(world.place.incoming().join("engine-id"), "of an exchange").unwrap();
    let changed = "volumes/records/_data/3";
    fs::write(world.place.directory.join(changed), "record three").unwrap();
    fs::write(world.place.directory.join("volumes/records/_data/new"), "new").unwrap();
    world.run().unwrap();
    assert_eq!(fs::read_to_string(world.place.target.join(changed)).unwrap(), "record three");
    assert!(world.place.target.join("volumes/records/_data/new").exists());
    assert_eq!(world.next(), Next::Nothing);
    world.erase().unwrap();
    assert!(!world.place.left().exists() && !world.place.incoming().exists());

    // Changed and changed back: there is nothing to copy.
    let world = cut_between_the_renames();
    let inode = fs::metadata(&world.place.target).unwrap().ino();
    fs::write(world.place.directory.join("x"), "x").unwrap();
    fs::remove_file(world.place.directory.join("x")).unwrap();
    let top = fs::metadata(&world.place.target).unwrap();
    File::open(&world.place.directory).unwrap().set_modified(top.modified().unwrap()).unwrap();
    world.run().unwrap();
    assert_eq!(fs::metadata(&world.place.target).unwrap().ino(), inode);
    world.expect_done();
}

#[test]
fn a_copy_that_somebody_worked_with_is_never_given_up() {
    if not_root() {
        return;
    }
    let cases: [(&str, Change); 3] = [
        ("volumes/records/_data/9 was changed", |w| {
            fs::write(w.place.target.join("volumes/records/_data/9"), "worked").unwrap();
        }),
        ("engine-id was changed", |w| {
            fs::write(w.place.target.join("engine-id"), "x").unwrap();
        }),
        ("is not known", |w| {
            let old = File::open(&w.place.directory).unwrap();
            rustix::fs::fremovexattr(old, COMPARED).unwrap();
        }),
    ];
    for (expected, change) in cases {
        let world = cut_between_the_renames();
        fs::write(world.place.directory.join("volumes/records/_data/3"), "record three").unwrap();
        change(&world);
        let inode = fs::metadata(&world.place.target).unwrap().ino();
        let error = format!("{:#}", world.run().unwrap_err());
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(fs::metadata(&world.place.target).unwrap().ino(), inode);
        assert_eq!(world.next(), Next::Finish);
    }
    // Or that is in use now.
    let world = cut_between_the_renames();
    fs::write(world.place.directory.join("volumes/records/_data/3"), "record three").unwrap();
    let idle = |path: &Path| {
        ensure!(path != world.place.target, "in use");
        Ok(())
    };
    let result = migrate(&world.place, world.device, &idle, &Progress::default());
    assert_eq!(result.unwrap_err().to_string(), "in use");
    assert!(is_whole(&world.place.target));
}

#[test]
fn what_is_written_after_the_comparison_is_not_erased() {
    if not_root() {
        return;
    }
    // Between the comparison and the switch: not switched, and copied anew.
    let world = World::new();
    let late = world.place.directory.join("volumes/records/_data/late");
    let asked = std::cell::Cell::new(0);
    let idle = |_: &Path| {
        asked.set(asked.get() + 1);
        if asked.get() == 2 {
            fs::write(&late, "late").unwrap();
        }
        Ok(())
    };
    let result = migrate(&world.place, world.device, &idle, &Progress::default());
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.contains("volumes/records/_data/late was changed after"), "{error}");
    assert!(!world.place.left().exists() && late.exists());
    world.run().unwrap();
    world.erase().unwrap();
    let copied = world.place.target.join("volumes/records/_data/late");
    assert_eq!(fs::read_to_string(copied).unwrap(), "late");

    // After the switch: it stays, whole.
    let cases: [(&str, Change); 3] = [
        ("volumes/records/_data/3 was changed after it had been compared", |w| {
            fs::write(w.place.left().join("volumes/records/_data/3"), "record 3").unwrap();
        }),
        ("is not known", |w| {
            let left = File::open(w.place.left()).unwrap();
            rustix::fs::fremovexattr(left, COMPARED).unwrap();
        }),
        ("is not known", |w| {
            set_attribute(&File::open(w.place.left()).unwrap().into(), COMPARED, "soon").unwrap();
        }),
    ];
    for (expected, change) in cases {
        let world = World::new();
        world.run().unwrap();
        change(&world);
        let error = format!("{:#}", world.erase().unwrap_err());
        assert!(error.contains(expected) && error.contains("data/docker"), "{expected}: {error}");
        assert!(is_whole(&world.place.left()));
    }
    let world = World::new();
    world.run().unwrap();
    let result = erase(&world.place, world.device, &|_| bail!("in use"), &Progress::default());
    assert_eq!(format!("{:#}", result.unwrap_err()), "nothing is erased: in use");
    assert!(is_whole(&world.place.left()));
}

#[test]
fn a_cut_after_the_switch_leaves_only_the_rest() {
    if not_root() {
        return;
    }
    // Before the empty directory was made: whatever mounts there makes it.
    let world = World::new();
    world.run().unwrap();
    fs::remove_dir(&world.place.directory).unwrap();
    assert_eq!(world.next(), Next::Nothing);
    assert!(world.look().left.is_some());
    world.erase().unwrap();
    assert!(!world.place.left().exists() && is_whole(&world.place.target));

    // Half erased.
    let world = World::new();
    world.run().unwrap();
    set_attribute(&File::open(world.place.left()).unwrap().into(), COMPARED, ERASING).unwrap();
    fs::remove_dir_all(world.place.left().join("volumes")).unwrap();
    world.expect_done();

    // Everything was deleted in Docker since: the mark says that this is the copy all the same.
    let world = World::new();
    world.run().unwrap();
    fs::remove_dir_all(world.place.target.join("volumes")).unwrap();
    fs::remove_dir_all(world.place.target.join("overlay2")).unwrap();
    assert_eq!(world.look().new, Some(Storage::Unused));
    assert_eq!(world.next(), Next::Nothing);
    world.erase().unwrap();
    assert!(!world.place.left().exists());
}

#[test]
fn what_is_not_proven_a_copy_is_never_erased() {
    if not_root() {
        return;
    }
    let changes: [fn(&World); 3] = [
        // The volume was made anew.
        |w| fs::remove_dir_all(&w.place.target).unwrap(),
        // It holds another copy.
        |w| put_mark(&w.place.target, "another"),
        // Somebody made the directory by hand.
        |w| {
            fs::remove_dir_all(&w.place.target).unwrap();
            fill(&w.place.target);
        },
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let world = World::new();
        world.run().unwrap();
        change(&world);
        let Next::Refuse(why) = world.next() else { panic!("case {i}") };
        assert!(why.contains(".hostagent-migrated-docker-vol-0123456789abcdef0"), "{why}");
        assert!(world.run().is_err() && world.erase().is_err(), "case {i}");
        assert!(is_whole(&world.place.left()), "case {i}");
    }
}

#[test]
fn data_on_both_sides_is_neither_merged_nor_overwritten() {
    if not_root() {
        return;
    }
    let theirs = |world: &World| fs::read_to_string(world.place.target.join("volumes/v/f"));
    for mark in [false, true] {
        let world = World::new();
        fs::create_dir_all(world.place.target.join("volumes/v")).unwrap();
        fs::write(world.place.target.join("volumes/v/f"), "theirs").unwrap();
        if mark {
            put_mark(&world.place.target, "theirs");
            put_mark(&world.place.directory, "ours");
        }
        let Next::Refuse(why) = world.next() else { panic!() };
        assert!(why.contains("/lib/docker") && why.contains("/data/docker"), "{why}");
        assert!(world.run().is_err());
        assert!(is_whole(&world.place.directory));
        assert_eq!(theirs(&world).unwrap(), "theirs");
    }
    // Even with the same mark only what is the same is switched.
    let world = World::new();
    fs::create_dir_all(world.place.target.join("volumes/v")).unwrap();
    fs::write(world.place.target.join("volumes/v/f"), "theirs").unwrap();
    put_mark(&world.place.target, "m");
    put_mark(&world.place.directory, "m");
    assert_eq!(world.next(), Next::Finish);
    assert!(world.run().is_err());
    assert!(is_whole(&world.place.directory));
    assert_eq!(theirs(&world).unwrap(), "theirs");
}

#[test]
fn data_after_the_switch_is_refused() {
    if not_root() {
        return;
    }
    let world = World::new();
    world.run().unwrap();
    fs::create_dir_all(world.place.directory.join("volumes/new")).unwrap();
    let Next::Refuse(why) = world.next() else { panic!() };
    assert!(why.contains("holds data again"), "{why}");
    assert!(world.run().is_err());
    assert!(is_whole(&world.place.left()) && is_whole(&world.place.target));
}

#[test]
fn what_a_fresh_daemon_left_on_the_volume_gives_way() {
    if not_root() {
        return;
    }
    let world = World::new();
    fs::create_dir_all(world.place.target.join("overlay2/l")).unwrap();
    fs::write(world.place.target.join("engine-id"), "another").unwrap();
    assert_eq!(world.next(), Next::Copy);
    world.run().unwrap();
    world.expect_done();
}

#[test]
fn nothing_is_moved_where_there_is_nothing() {
    let world = World::new();
    fs::remove_dir_all(&world.place.directory).unwrap();
    assert_eq!(world.next(), Next::Nothing);
    world.run().unwrap();
    fs::create_dir(&world.place.directory).unwrap();
    fs::write(world.place.directory.join("engine-id"), "x").unwrap();
    assert_eq!(world.next(), Next::Nothing);
    world.run().unwrap();
    assert!(!world.place.target.exists() && !world.place.left().exists());
}

#[test]
fn the_copy_is_made_on_the_volume_only() {
    let world = World::new();
    let elsewhere = DevNum { major: 4095, minor: 1 };
    let error = migrate(&world.place, elsewhere, &|_| Ok(()), &Progress::default()).unwrap_err();
    assert!(error.to_string().contains("not on the data volume"), "{error:#}");
    // A link in the place of the target leads nowhere.
    fs::create_dir(world.dir.path().join("trap")).unwrap();
    symlink(world.dir.path().join("trap"), &world.place.target).unwrap();
    assert!(matches!(world.next(), Next::Refuse(_)));
    fs::remove_file(&world.place.target).unwrap();
    symlink(world.dir.path().join("trap"), world.place.incoming()).unwrap();
    assert!(world.run().is_err());
    assert_eq!(fs::read_dir(world.dir.path().join("trap")).unwrap().count(), 0);
    assert!(is_whole(&world.place.directory));
}

#[test]
fn a_directory_in_use_is_not_switched() {
    if not_root() {
        return;
    }
    let world = World::new();
    let run = |idle: &dyn Fn(&Path) -> Result<()>| {
        let result = migrate(&world.place, world.device, idle, &Progress::default());
        format!("{:#}", result.unwrap_err())
    };
    // From the beginning: nothing is copied.
    assert!(run(&|_| bail!("in use")).contains("in use"));
    assert!(!world.place.incoming().exists());
    // Since the copy began: it is not switched.
    let asked = std::cell::Cell::new(0);
    let later = |_: &Path| {
        asked.set(asked.get() + 1);
        ensure!(asked.get() < 2, "in use");
        Ok(())
    };
    assert!(run(&later).contains("nothing is switched: in use"));
    assert!(is_whole(&world.place.directory) && !world.place.left().exists());
    assert_eq!(world.next(), Next::Finish);
    world.run().unwrap();
    world.expect_done();
}

#[test]
fn what_is_kept_elsewhere_through_a_link_is_not_moved() {
    let outside = |world: &World, link: &str, target: &str| {
        let path = world.place.directory.join(link);
        let _ = fs::remove_dir_all(&path);
        symlink(target.replace("TOP", &world.dir.path().to_string_lossy()), path).unwrap();
        world.next()
    };
    for (link, target) in [
        ("overlay2", "TOP/srv/overlay2"),
        ("overlay2", "../../srv/overlay2"),
        ("containers", "/no/such/place"),
        ("volumes/records/_data", "TOP/srv/overlay2"),
        ("volumes/v", "TOP/srv/overlay2"),
    ] {
        let world = World::new();
        fs::create_dir_all(world.dir.path().join("srv/overlay2")).unwrap();
        let Next::Refuse(why) = outside(&world, link, target) else { panic!("{link} {target}") };
        let place = world.place.directory.join(link).display().to_string();
        assert!(why.contains(&format!("{place} is a link to ")), "{why}");
        let error = world.run().unwrap_err().to_string();
        assert!(error.contains("is a link to "), "{error}");
        assert!(!world.place.target.exists() && !world.place.incoming().exists());
    }
    // What stays inside stays whole.
    for (link, target) in [("big", "volumes/records"), ("big", "TOP/lib/docker/volumes")] {
        let world = World::new();
        assert_eq!(outside(&world, link, target), Next::Copy, "{target}");
    }
    // Seen through a link in the directory's own place, too: what is written in it leads elsewhere then.
    let world = World::new();
    let real = world.dir.path().canonicalize().unwrap().join("data/other");
    fs::rename(&world.place.directory, &real).unwrap();
    symlink(&real, &world.place.directory).unwrap();
    assert_eq!(world.next(), Next::Copy);
    symlink(real.join("volumes"), real.join("containers")).unwrap();
    let Next::Refuse(why) = world.next() else { panic!() };
    assert!(why.contains("data/other/containers is a link to "), "{why}");
}

#[test]
fn old_copies_of_other_volumes_are_named() {
    let world = World::new();
    let other = world.place.directory.with_file_name(".hostagent-migrated-docker-vol-0ffffffff");
    fs::create_dir(&other).unwrap();
    fs::create_dir(world.place.directory.with_file_name(".hostagent-migrated-containerd-x"))
        .unwrap();
    let found = world.look();
    assert_eq!(found.others, [other.display().to_string()]);
    assert_eq!(found.left, None);
}

#[test]
fn a_migration_ended_anywhere_is_finished_by_the_next() {
    if not_root() {
        return;
    }
    // Counted once, so that every part of the way is met.
    let world = World::new();
    let progress = Progress::default();
    migrate(&world.place, world.device, &|_| Ok(()), &progress).unwrap();
    let moves = progress.moves();
    for at in 0..=moves {
        let world = World::new();
        let progress = Progress::default();
        progress.cancel_after(at);
        let ended = migrate(&world.place, world.device, &|_| Ok(()), &progress).is_err();
        assert_eq!(ended, at < moves, "{at} of {moves}");
        let old = if world.place.left().exists() {
            world.place.left()
        } else {
            world.place.directory.clone()
        };
        assert!(is_whole(&old), "the old copy is not whole after {at} of {moves}");
        world.run().unwrap();
        let (old, new) = (world.place.left(), &world.place.target);
        let open = |path: &Path| File::open(path).unwrap().into();
        let same = compare(open(&old), open(new), &Progress::default()).unwrap();
        assert!(same.is_ok(), "{same:?}");
        // And the erasing, ended somewhere too.
        let progress = Progress::default();
        progress.cancel_after(at % 60);
        let _ = erase(&world.place, world.device, &|_| Ok(()), &progress);
        world.expect_done();
    }
}

#[test]
fn space_is_kept_in_reserve() {
    let usage = |bytes, inodes| Usage { bytes, inodes };
    let table = [
        (usage(0, 0), usage(64 << 20, 1000), true),
        (usage(0, 0), usage((64 << 20) - 1, 1000), false),
        (usage(1000 << 20, 10), usage(1114 << 20, 10_000), true),
        (usage(1000 << 20, 10), usage(1113 << 20, 10_000), false),
        (usage(1 << 20, 10_000), usage(1 << 40, 10_999), false),
        (usage(1 << 20, 10_000), usage(1 << 40, u64::MAX), true),
    ];
    for (needed, free, fits) in table {
        let lacks = Space { needed, free }.lacks();
        assert_eq!(lacks.is_none(), fits, "{needed:?} {free:?} {lacks:?}");
    }
    let world = World::new();
    let space = space(&[&world.place], world.device).unwrap();
    assert!(space.needed.bytes > 0 && space.free.bytes > 0);
}

//! Blobs in a directory.

use crate::data::{bytes, comes_back, get, put_in_pieces};
use crate::suite::{self, Place, all, content, options, table};
use ashlar_store::blobs::{BlobError, BlobOptions, Blobs, PIECE_BYTES, Roots, open};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

impl Place for PathBuf {
    fn objects(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.clone()];
        while let Some(folder) = folders.pop() {
            // A file may go while it is looked at.
            for entry in fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path != self.join("lock") {
                    found.push(path.strip_prefix(self).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        // As in a service's list: blobs before tables here, so that both places agree.
        found.sort_by_key(|path| !path.starts_with("sha256"));
        found
    }

    fn change(&self, path: &str, change: &dyn Fn(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.join(path)).unwrap();
        change(&mut bytes);
        fs::write(self.join(path), bytes).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.join(path)).unwrap();
    }

    fn make_old(&self, path: &str, age: Duration) {
        let file = File::options().write(true).open(self.join(path)).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }
}

async fn opened(folder: &Path) -> Blobs {
    open(folder.to_str().unwrap(), &options()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("deep/er");
    suite::run(&opened(&root).await, &root).await;
}

#[test]
fn a_directory_keeps_blobs_of_any_length() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let blobs = runtime.block_on(opened(folder.path()));
    suite::run_properties(&runtime, &blobs);
}

#[tokio::test]
async fn addresses_name_directories() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let info = open(path, &options()).await.unwrap().put(b"abc").await.unwrap();
    let same = open(&format!("file://{path}"), &options()).await.unwrap();
    assert_eq!(same.size(info.id).await, Ok(Some(3)));
    for wrong in ["", "file://relative/path", "ftp://hidden-word/x", "redis://:hidden-word@host/"] {
        let error = open(wrong, &options()).await.expect_err(wrong);
        assert!(matches!(error, BlobError::Address(_)), "{wrong}: {error}");
        assert!(!error.to_string().contains("hidden-word"), "{error}");
    }
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = open(file.to_str().unwrap(), &options()).await.err().unwrap();
    assert!(matches!(error, BlobError::Disk { .. }), "{error}");
    for senseless in [
        BlobOptions { attempts: 0, ..options() },
        BlobOptions { part_bytes: 0, ..options() },
        BlobOptions { copy_bytes: 0, ..options() },
    ] {
        assert!(matches!(open(path, &senseless).await.err(), Some(BlobError::Invalid(_))));
    }
}

#[tokio::test]
async fn a_blob_is_a_plain_file_for_its_owner_alone() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("blobs");
    let blobs = opened(&root).await;
    let stored = bytes(1, PIECE_BYTES + 1);
    let info = put_in_pieces(&blobs, &stored, &[70_000]).await.unwrap();
    for path in [content(info.id), table(info.id), "lock".into()] {
        let mode = fs::metadata(root.join(path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
    let output = Command::new("sha256sum").arg(root.join(content(info.id))).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().starts_with(&info.id.hex()));
    // Another process's view, opened later, has it too.
    comes_back(&opened(&root).await, info, &stored, "").await;
}

#[tokio::test]
async fn the_last_bytes_of_a_file_system_are_left_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let greedy = BlobOptions { keep_free_bytes: u64::MAX, ..options() };
    let path = folder.path().to_str().unwrap();
    let blobs = open(path, &greedy).await.unwrap();
    let error = blobs.put(b"abc").await.unwrap_err();
    assert!(error.is_full() && error.to_string().contains("free some space"), "{error}");
    let error = blobs.put(&bytes(1, 3 * PIECE_BYTES)).await.unwrap_err();
    assert!(error.is_full(), "{error}");
    assert_eq!(folder.path().to_owned().objects(), Vec::<String>::new());
}

/// Runs one test of this program again, inside a small file system of its own where the system allows that.
#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=3m none "$1" && exec "$2" --ignored --exact directory::on_a_disk_of_three_megabytes"#;
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]);
    command.arg(folder.path()).arg(program).env("ASHLAR_SMALL_DISK", folder.path());
    let Ok(output) = command.output() else { return eprintln!("skipped: no unshare") };
    let text = String::from_utf8_lossy(&output.stdout);
    if text.is_empty() {
        return eprintln!("skipped: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[tokio::test]
#[ignore = "run by a_full_disk_is_told_and_leaves_nothing"]
async fn on_a_disk_of_three_megabytes() {
    let Some(root) = std::env::var_os("ASHLAR_SMALL_DISK").map(PathBuf::from) else { return };
    let blobs = opened(&root).await;
    let kept = blobs.put(&bytes(1, PIECE_BYTES)).await.unwrap();
    for length in [3 << 20, 8 << 20] {
        let error = blobs.put(&bytes(2, length)).await.unwrap_err();
        assert!(error.is_full(), "{error}");
        suite::settle(&blobs, &root, 1).await;
    }
    // What was there is whole, and once there is room it goes on.
    assert_eq!(get(&blobs, kept).await.1, None);
    let info = blobs.put(&bytes(3, PIECE_BYTES + 1)).await.unwrap();
    assert_eq!(get(&blobs, info).await.1, None);
}

#[tokio::test]
async fn a_live_writer_keeps_its_file_and_a_dead_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let (blobs, other) = (opened(&root).await, opened(&root).await);
    let stored = bytes(1, 3 * PIECE_BYTES);
    let mut writer = blobs.writer();
    writer.write(&stored[..2 * PIECE_BYTES]).await.unwrap();
    // As a process leaves it that was killed.
    fs::write(root.join("incoming/left"), "half").unwrap();
    for path in root.objects() {
        root.make_old(&path, Duration::from_secs(100_000));
    }
    let swept = other.sweep(&Roots::default(), Duration::from_secs(3600)).await.unwrap();
    assert_eq!(swept.unfinished, 1);
    writer.write(&stored[2 * PIECE_BYTES..]).await.unwrap();
    let info = writer.finish().await.unwrap();
    comes_back(&other, info, &stored, "").await;
    // And a young one may belong to a process whose lock we cannot see.
    fs::write(root.join("incoming/left"), "half").unwrap();
    assert_eq!(other.sweep(&Roots::default(), Duration::from_secs(3600)).await.unwrap().unfinished, 0);
}

#[tokio::test]
async fn files_of_others_are_neither_listed_nor_touched() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let blobs = opened(&root).await;
    let info = blobs.put(b"abc").await.unwrap();
    let hex = info.id.hex();
    let upper = format!("sha256/ba/{}", hex.to_uppercase());
    let misplaced = format!("sha256/00/{hex}");
    fs::create_dir(root.join("sha256/00")).unwrap();
    for foreign in ["sha256/README", "sha256/ba/short", &upper, &misplaced] {
        fs::write(root.join(foreign), "x").unwrap();
    }
    assert_eq!(all(&blobs, 1).await, [info]);
    assert_eq!(blobs.sweep(&Roots::default(), Duration::ZERO).await.unwrap().blobs, 1);
    assert_eq!(root.objects().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_blob_that_is_uploaded_while_it_is_swept_survives() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let (blobs, sweeper) = (opened(&root).await, opened(&root).await);
    let hour = Duration::from_secs(3600);
    for turn in 0..100 {
        let stored = bytes(turn, 100);
        let info = blobs.put(&stored).await.unwrap();
        root.make_old(&content(info.id), 2 * hour);
        let roots = Roots::default();
        let (put, swept) = tokio::join!(blobs.put(&stored), sweeper.sweep(&roots, hour));
        swept.unwrap();
        assert_eq!(put, Ok(info));
        comes_back(&blobs, info, &stored, &format!("turn {turn}")).await;
    }
}

#[tokio::test]
async fn a_lock_that_is_never_given_back_stops_nobody_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let quick = BlobOptions { timeout: Duration::from_millis(200), ..options() };
    let blobs = open(folder.path().to_str().unwrap(), &quick).await.unwrap();
    let info = blobs.put(b"before").await.unwrap();
    let held = File::options().write(true).open(folder.path().join("lock")).unwrap();
    held.lock().unwrap();
    let start = Instant::now();
    let error = blobs.put(b"abc").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let error = blobs.delete(info.id).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    // Reading needs no lock.
    comes_back(&blobs, info, b"before", "").await;
    drop(held);
    blobs.put(b"abc").await.unwrap();
}

/// Runs one test of this program again and kills it while it writes.
#[test]
fn a_killed_process_leaves_whole_blobs_alone() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for turn in 0..6 {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "directory::writes_until_it_is_killed"])
            .env("ASHLAR_BLOBS", &root)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !root.join("incoming").is_dir() || root.objects().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(20), "the child writes nothing");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(turn * 17));
        child.kill().unwrap();
        child.wait().unwrap();
        runtime.block_on(async {
            let blobs = opened(&root).await;
            for info in all(&blobs, 100).await {
                assert_eq!(get(&blobs, info).await.1, None, "half a blob is visible");
                blobs.read_range(info.id, 0..1).await.unwrap();
            }
            blobs.sweep(&Roots::default(), Duration::ZERO).await.unwrap();
            assert_eq!(root.objects(), Vec::<String>::new());
        });
    }
}

#[tokio::test]
#[ignore = "run by a_killed_process_leaves_whole_blobs_alone"]
async fn writes_until_it_is_killed() {
    let Some(root) = std::env::var_os("ASHLAR_BLOBS").map(PathBuf::from) else { return };
    let blobs = opened(&root).await;
    for seed in 0.. {
        blobs.put(&bytes(seed, 2 * PIECE_BYTES + 1000)).await.unwrap();
    }
}

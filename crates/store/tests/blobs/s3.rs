//! Blobs in a bucket.

use crate::data::{bytes, comes_back, get, put_in_pieces};
use crate::fake_s3::{ACCESS, BUCKET, FakeS3, Fault, SECRET, TOKEN};
use crate::suite::{self, COPY_BYTES, PART_BYTES, Place, all, content, options};
use ashlar_store::blobs::open::open_s3;
use ashlar_store::blobs::{BlobError, BlobOptions, Blobs, Credentials, PIECE_BYTES, Roots, S3Address};
use axum::http::Method;
use std::time::{Duration, Instant};

/// Copied by the service in parts.
const LARGE: usize = 2 * COPY_BYTES as usize + 5;

async fn started() -> (FakeS3, Blobs) {
    let fake = FakeS3::start().await;
    let blobs = fake.open(&options());
    (fake, blobs)
}

fn shows_no_secret(error: &BlobError) {
    let text = format!("{error} {error:?}");
    assert!(!text.contains("hidden-word"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_conforms() {
    let (fake, blobs) = started().await;
    suite::run(&blobs, &fake).await;
}

#[test]
fn a_bucket_keeps_blobs_of_any_length() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_fake, blobs) = runtime.block_on(started());
    suite::run_properties(&runtime, &blobs);
}

#[tokio::test]
async fn a_service_that_is_busy_for_a_moment_is_asked_again() {
    let (fake, blobs) = started().await;
    let faults = [
        Fault::Answer(503, "SlowDown"),
        Fault::Answer(500, "InternalError"),
        Fault::Answer(429, "TooManyRequests"),
        Fault::Answer(400, "RequestTimeout"),
        Fault::Answer(502, ""),
        Fault::Cut,
        Fault::LoseAnswer,
    ];
    // Every request of a large put meets every fault.
    for fault in faults {
        let steps = [
            (Method::POST, "incoming/"),
            (Method::PUT, "partNumber=2"),
            (Method::POST, "uploadId="),
            (Method::POST, "sha256/"),
            (Method::PUT, "sha256/"),
            (Method::PUT, "pieces/"),
            (Method::DELETE, "incoming/"),
        ];
        for (method, part) in steps {
            let stored = bytes(1, LARGE);
            fake.fail(method.clone(), part, fault, 2);
            let info = put_in_pieces(&blobs, &stored, &[90_000]).await;
            let info = info.unwrap_or_else(|error| panic!("{method} {part} {fault:?}: {error}"));
            assert!(fake.all_failed(), "{method} {part} {fault:?}");
            comes_back(&blobs, info, &stored, "").await;
            assert_eq!(fake.objects().len(), 2, "{method} {part} {fault:?}: {:?}", fake.objects());
            blobs.delete(info.id).await.unwrap();
            // An upload whose beginning was answered into the void is left to a sweep.
            blobs.sweep(&Roots::default(), Duration::ZERO).await.unwrap();
            suite::settle(&blobs, &fake, 0).await;
        }
        let info = blobs.put(b"small").await.unwrap();
        fake.fail(Method::GET, "sha256/", fault, 2);
        fake.fail(Method::GET, "list-type", fault, 2);
        // An answer to HEAD has no body that could tell this 400 from others, or that could be cut.
        if matches!(fault, Fault::Answer(status, _) if status != 400) {
            fake.fail(Method::HEAD, "sha256/", fault, 2);
        }
        comes_back(&blobs, info, b"small", &format!("{fault:?}")).await;
        assert_eq!(all(&blobs, 5).await, [info]);
        assert_eq!(blobs.size(info.id).await, Ok(Some(5)));
        assert!(fake.all_failed());
        blobs.delete(info.id).await.unwrap();
    }
}

/// The service has begun it, and the answer is on its way.
#[tokio::test]
async fn a_put_that_is_dropped_while_its_upload_begins_leaves_none() {
    let (fake, blobs) = started().await;
    let stored = bytes(2, LARGE);
    for part in ["incoming/", "sha256/"] {
        fake.fail(Method::POST, part, Fault::Slow, 1);
        let begun = async {
            while !(fake.uploads() == 1 && fake.has_failed()) {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            put = put_in_pieces(&blobs, &stored, &[90_000]) => panic!("too fast: {put:?}"),
            () = begun => {}
        }
        let gone = async {
            while fake.uploads() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.expect(part);
        // The table of pieces, which goes first, is left to a sweep.
        blobs.sweep(&Roots::default(), Duration::ZERO).await.unwrap();
        suite::settle(&blobs, &fake, 0).await;
    }
}

#[tokio::test]
async fn a_success_that_holds_an_error_is_none() {
    let (fake, blobs) = started().await;
    for (method, part) in [(Method::POST, "uploadId="), (Method::PUT, "sha256/"), (Method::POST, "sha256/")] {
        for length in [COPY_BYTES as usize, LARGE] {
            if part == "sha256/" && method == Method::POST && length != LARGE {
                continue;
            }
            fake.fail(method.clone(), part, Fault::LateError, 1);
            let stored = bytes(2, length);
            let info = blobs.put(&stored).await.unwrap();
            assert!(fake.all_failed());
            comes_back(&blobs, info, &stored, "").await;
            blobs.delete(info.id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn attempts_end_and_leave_nothing() {
    let (fake, blobs) = started().await;
    for part in ["partNumber=3", "pieces/", "sha256/"] {
        fake.fail(Method::PUT, part, Fault::Answer(503, "SlowDown"), 1000);
        let error = blobs.put(&bytes(1, LARGE)).await.unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains("SlowDown, 4 attempts"), "{error}");
        shows_no_secret(&error);
        fake.all_failed();
        assert!(all(&blobs, 5).await.is_empty());
        // A table may stay without its blob, for a sweep.
        for table in fake.objects().iter().filter(|path| path.starts_with("pieces/")) {
            fake.remove(table);
        }
        suite::settle(&blobs, &fake, 0).await;
    }
    fake.requests();
    fake.fail(Method::PUT, "sha256/", Fault::Cut, 1000);
    let error = blobs.put(b"small").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(fake.requests().len(), 4);
}

#[tokio::test]
async fn reading_goes_on_where_the_connection_was_cut() {
    let (fake, blobs) = started().await;
    let stored = bytes(3, LARGE);
    let info = blobs.put(&stored).await.unwrap();
    for after in [0, 1, PIECE_BYTES, LARGE - 1] {
        fake.requests();
        fake.fail(Method::GET, "sha256/", Fault::CutBody(after), 1);
        comes_back(&blobs, info, &stored, &format!("{after}")).await;
        assert_eq!(fake.requests().len(), 2);
        assert!(fake.all_failed());
    }
    // Again and again, with progress in between.
    fake.fail(Method::GET, "sha256/", Fault::CutBody(100_000), 15);
    comes_back(&blobs, info, &stored, "").await;
    assert!(fake.all_failed());
    // Without, it ends.
    fake.fail(Method::GET, "sha256/", Fault::CutBody(0), 1000);
    let (_, error) = get(&blobs, info).await;
    assert!(error.as_ref().is_some_and(BlobError::is_retryable), "{error:?}");
    fake.all_failed();
    // Ranges and their tables too.
    fake.fail(Method::GET, "sha256/", Fault::CutBody(70), 1);
    fake.fail(Method::GET, "pieces/", Fault::CutBody(7), 1);
    assert!(blobs.read_range(info.id, 10..1_100_000).await.unwrap() == stored[10..1_100_000]);
    assert!(fake.all_failed());
}

#[tokio::test]
async fn wrong_bytes_from_the_service_are_told() {
    let (fake, blobs) = started().await;
    for length in [100, LARGE] {
        let stored = bytes(4, length);
        let info = blobs.put(&stored).await.unwrap();
        fake.fail(Method::GET, "sha256/", Fault::Flip, 1);
        let (found, error) = get(&blobs, info).await;
        assert!(matches!(error, Some(BlobError::Corrupt { id, .. }) if id == info.id), "{error:?}");
        assert!(found.len() < length);
        // A range that came wrong and whose blob is right is read from the whole.
        fake.fail(Method::GET, "sha256/", Fault::Flip, 1);
        let answer = blobs.read_range(info.id, 0..50).await;
        if length == LARGE {
            assert_eq!(answer.unwrap(), stored[..50]);
        } else {
            assert!(matches!(answer, Err(BlobError::Corrupt { .. })));
        }
    }
}

#[tokio::test]
async fn a_service_that_hangs_is_unavailable_in_time() {
    let fake = FakeS3::start().await;
    let blobs = fake.open(&BlobOptions { timeout: Duration::from_millis(150), attempts: 2, ..options() });
    let info = blobs.put(b"small").await.unwrap();
    let start = Instant::now();
    fake.fail(Method::PUT, "sha256/", Fault::Hang, 1000);
    fake.fail(Method::GET, "sha256/", Fault::StallBody(2), 1000);
    fake.fail(Method::HEAD, "sha256/", Fault::Hang, 1000);
    let error = blobs.put(b"other").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let error = blobs.size(info.id).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let (_, error) = get(&blobs, info).await;
    // Two bytes come each time, so the five are there in the end.
    assert_eq!(error, None);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let address = S3Address::parse("s3://bucket?endpoint=http://127.0.0.1:1").unwrap();
    let blobs = open_s3(&address, FakeS3::credentials(), &options()).unwrap();
    let error = blobs.put(b"abc").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    shows_no_secret(&error);
}

#[tokio::test]
async fn refusals_name_the_reason_and_no_secret() {
    let (fake, blobs) = started().await;
    let other = |access: &str, secret: &str, token: Option<&str>| {
        let credentials = Credentials::new(access, secret, token).unwrap();
        open_s3(&fake.address(), credentials, &options()).unwrap()
    };
    let wrong_bucket = S3Address { bucket: "another".into(), ..fake.address() };
    let cases = [
        (other(ACCESS, "wrong-hidden-word", Some(TOKEN)), "SignatureDoesNotMatch"),
        (other("wrong-hidden-word", SECRET, Some(TOKEN)), "InvalidAccessKeyId"),
        (other(ACCESS, SECRET, None), "InvalidToken"),
        (open_s3(&wrong_bucket, FakeS3::credentials(), &options()).unwrap(), "NoSuchBucket"),
    ];
    for (blobs, expected) in cases {
        fake.requests();
        let error = blobs.put(b"abc").await.unwrap_err();
        assert!(matches!(&error, BlobError::Refused { code, .. } if code == expected), "{error}");
        assert!(error.to_string().contains("check the access key"), "{error}");
        shows_no_secret(&error);
        assert_eq!(fake.requests().len(), 1, "a refusal is final");
        let error = blobs.list(None, 1).await.unwrap_err();
        shows_no_secret(&error);
    }
    fake.fail(Method::PUT, "sha256/", Fault::Answer(403, "hidden-word <b>"), 1);
    let error = blobs.put(b"abc").await.unwrap_err();
    assert!(matches!(error, BlobError::Refused { .. }), "{error}");
    shows_no_secret(&error);
    for (status, code) in [(507, "Whatever"), (403, "QuotaExceeded"), (500, "XMinioStorageFull")] {
        fake.fail(Method::PUT, "partNumber=2", Fault::Answer(status, code), 1);
        let error = blobs.put(&bytes(1, LARGE)).await.unwrap_err();
        assert!(error.is_full() && error.to_string().contains(BUCKET), "{error}");
    }
}

#[tokio::test]
async fn a_clock_that_is_wrong_follows_the_service() {
    let (fake, blobs) = started().await;
    for hours in [5, 0, 3] {
        fake.set_clock_ahead(Duration::from_secs(hours * 3600));
        let stored = bytes(hours, LARGE);
        let info = blobs.put(&stored).await.unwrap();
        comes_back(&blobs, info, &stored, "").await;
        // Ages are by the service's clock alone.
        let swept = blobs.sweep(&Roots::default(), Duration::from_secs(1800)).await.unwrap();
        assert_eq!(swept.blobs, 0);
        blobs.delete(info.id).await.unwrap();
    }
}

#[tokio::test]
async fn uploads_that_nobody_finished_go_when_they_are_old() {
    let (fake, blobs) = started().await;
    let mut writers = Vec::new();
    for seed in 0..5 {
        let mut writer = blobs.writer();
        writer.write(&bytes(seed, 2 * PART_BYTES + 1)).await.unwrap();
        // As if its process had been killed: nothing is cleaned up.
        writers.push(std::mem::ManuallyDrop::new(writer));
    }
    fake.put("incoming/left", b"half");
    let hour = Duration::from_secs(3600);
    assert_eq!(blobs.sweep(&Roots::default(), hour).await.unwrap().unfinished, 0);
    assert_eq!(fake.uploads(), 5);
    fake.make_uploads_old(2 * hour);
    fake.make_old("incoming/left", 2 * hour);
    assert_eq!(blobs.sweep(&Roots::default(), hour).await.unwrap().unfinished, 6);
    assert_eq!((fake.uploads(), fake.objects().len()), (0, 0));
    let mut writer = writers.pop().map(std::mem::ManuallyDrop::into_inner).unwrap();
    let late = async {
        writer.write(&bytes(9, 4 * PART_BYTES)).await?;
        writer.finish().await
    };
    let error = late.await.unwrap_err();
    assert!(matches!(&error, BlobError::Refused { code, .. } if code == "NoSuchUpload"), "{error}");
    assert!(all(&blobs, 5).await.is_empty());
}

#[tokio::test]
async fn objects_of_others_are_neither_listed_nor_touched() {
    let (fake, blobs) = started().await;
    let info = blobs.put(b"abc").await.unwrap();
    let foreign = ["sha256/00/short", "sha256/a", "sha256/ba/BA", "sha256/zz", "other"];
    for path in foreign {
        fake.put(path, b"x");
    }
    fake.make_old(&content(info.id), Duration::from_secs(9));
    for page in [1, 2, 10] {
        assert_eq!(all(&blobs, page).await, [info]);
    }
    let swept = blobs.sweep(&Roots::default(), Duration::from_secs(1)).await.unwrap();
    assert_eq!(swept.blobs, 1);
    assert_eq!(fake.objects().len(), foreign.len());
}

#[tokio::test]
async fn the_largest_blob_is_what_a_service_has_parts_for() {
    let fake = FakeS3::start().await;
    let blobs = fake.open(&BlobOptions { part_bytes: 100, blob_bytes_max: u64::MAX, ..options() });
    let error = blobs.writer().write(&bytes(1, 1_000_001)).await.unwrap_err();
    assert!(matches!(error, BlobError::TooLarge { limit: 1_000_000, .. }), "{error}");
}

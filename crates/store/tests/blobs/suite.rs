//! What every place for blobs must do.

use crate::data::{bytes, comes_back, get, put_in_pieces, sha256};
use crate::{manifest, sweep};
use ashlar_store::blobs::{
    BlobError, BlobInfo, BlobOptions, Blobs, PAGE_BLOBS_MAX, PIECE_BYTES, READ_BYTES_MAX, Roots,
};
use ashlar_vocabulary::BlobId;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;
use std::time::Duration;

/// Parts of S3's objects here, so that a few megabytes are many parts.
pub(crate) const PART_BYTES: usize = 256 << 10;
/// What a service copies at once here.
pub(crate) const COPY_BYTES: u64 = 1 << 20;

pub(crate) fn options() -> BlobOptions {
    BlobOptions {
        blob_bytes_max: 64 << 20,
        keep_free_bytes: 0,
        timeout: Duration::from_secs(20),
        attempts: 4,
        backoff: Duration::from_millis(2),
        part_bytes: PART_BYTES,
        copy_bytes: COPY_BYTES,
    }
}

/// Behind the store's back.
pub(crate) trait Place: Sync {
    /// The paths of all objects, unfinished ones included.
    fn objects(&self) -> Vec<String>;
    /// Changes the bytes of an object.
    fn change(&self, path: &str, change: &dyn Fn(&mut Vec<u8>));
    /// Removes an object.
    fn remove(&self, path: &str);
    /// Makes an object as old as this.
    fn make_old(&self, path: &str, age: Duration);
    /// How many uploads a service knows that have not been completed.
    fn uploads(&self) -> usize {
        0
    }
}

pub(crate) fn content(id: BlobId) -> String {
    format!("sha256/{}/{}", &id.hex()[..2], id.hex())
}

pub(crate) fn table(id: BlobId) -> String {
    format!("pieces/{}/{}", &id.hex()[..2], id.hex())
}

/// Everything that is in the store.
pub(crate) async fn all(blobs: &Blobs, page: usize) -> Vec<BlobInfo> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = blobs.list(after, page).await.unwrap();
        found.extend(page.blobs);
        after = page.next;
        if after.is_none() {
            return found;
        }
    }
}

/// Empties the store.
async fn clear(blobs: &Blobs) {
    for blob in all(blobs, PAGE_BLOBS_MAX).await {
        assert!(blobs.delete(blob.id).await.unwrap());
    }
}

pub(crate) async fn run(blobs: &Blobs, place: &dyn Place) {
    names_are_sha256_and_content_is_stored_once(blobs, place).await;
    what_is_not_there_is_told(blobs).await;
    lengths_around_every_border_come_back(blobs, place).await;
    ranges_are_slices(blobs).await;
    a_flipped_bit_is_never_delivered(blobs, place).await;
    another_length_is_damage(blobs, place).await;
    a_damaged_table_costs_time_and_not_truth(blobs, place).await;
    lists_come_in_pages(blobs).await;
    dropped_writers_leave_nothing_visible(blobs, place).await;
    a_write_that_is_dropped_midway_ends_the_writer(blobs, place).await;
    too_large_is_refused_early(blobs).await;
    many_writers_of_the_same_content_agree(blobs, place).await;
    clear(blobs).await;
    manifest::run(blobs, place).await;
    clear(blobs).await;
    sweep::run(blobs, place).await;
    clear(blobs).await;
    assert_eq!(place.objects(), Vec::<String>::new());
}

async fn names_are_sha256_and_content_is_stored_once(blobs: &Blobs, place: &dyn Place) {
    let nothing = blobs.put(b"").await.unwrap();
    assert_eq!(
        nothing.id.to_string(),
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    );
    let abc = blobs.put(b"abc").await.unwrap();
    assert_eq!(abc.id.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(abc.bytes, 3);
    assert_eq!(blobs.put(b"abc").await.unwrap(), abc);
    assert_eq!(all(blobs, 10).await, [abc, nothing]);
    assert_eq!(place.objects(), [content(abc.id), content(nothing.id)]);
    assert_eq!(blobs.read(abc.id, 3).await.unwrap(), b"abc");
    assert_eq!(blobs.read(nothing.id, 0).await.unwrap(), b"");
    assert!(matches!(blobs.read(abc.id, 2).await, Err(BlobError::TooLarge { size: 3, limit: 2, .. })));
    assert!(blobs.delete(abc.id).await.unwrap());
    assert!(!blobs.delete(abc.id).await.unwrap());
    assert!(blobs.delete(nothing.id).await.unwrap());
    assert!(all(blobs, 10).await.is_empty());
}

async fn what_is_not_there_is_told(blobs: &Blobs) {
    let id = BlobId([7; 32]);
    assert_eq!(blobs.size(id).await, Ok(None));
    assert_eq!(blobs.get(id).await.err(), Some(BlobError::NotFound(id)));
    assert_eq!(blobs.read(id, 10).await, Err(BlobError::NotFound(id)));
    for range in [0..0, 0..1, 5 << 20..6 << 20] {
        assert_eq!(blobs.read_range(id, range).await, Err(BlobError::NotFound(id)));
    }
    assert_eq!(blobs.delete(id).await, Ok(false));
}

async fn lengths_around_every_border_come_back(blobs: &Blobs, place: &dyn Place) {
    let borders = [PART_BYTES, PIECE_BYTES, 2 * PIECE_BYTES, 3 * PIECE_BYTES + PART_BYTES];
    let lengths = borders.iter().flat_map(|border| [border - 1, *border, border + 1]);
    for length in lengths.chain([1]) {
        let stored = bytes(length as u64, length);
        let info = put_in_pieces(blobs, &stored, &[100_003, 1, 300_000, 64]).await.unwrap();
        assert_eq!(info.id.hex(), sha256(&stored));
        assert_eq!(info.bytes, length as u64);
        assert_eq!(blobs.size(info.id).await, Ok(Some(length as u64)));
        comes_back(blobs, info, &stored, &format!("{length}")).await;
        let tables = usize::from(length > PIECE_BYTES);
        assert_eq!(place.objects().len(), 1 + tables, "{length}: {:?}", place.objects());
        assert!(blobs.delete(info.id).await.unwrap());
        assert_eq!(place.objects(), Vec::<String>::new());
    }
}

async fn ranges_are_slices(blobs: &Blobs) {
    let piece = PIECE_BYTES as u64;
    for length in [0, 1, 70_000, PIECE_BYTES, PIECE_BYTES + 1, 4 * PIECE_BYTES, 4 * PIECE_BYTES + 77] {
        let stored = bytes(3, length);
        let info = blobs.put(&stored).await.unwrap();
        let end = length as u64;
        let borders =
            [0, 1, piece - 1, piece, piece + 1, 3 * piece - 1, 3 * piece, end.saturating_sub(1), end];
        for start in borders.into_iter().filter(|at| *at <= end) {
            for stop in borders.into_iter().filter(|at| (start..=end).contains(at)) {
                let found = blobs.read_range(info.id, start..stop).await.unwrap();
                let (from, to) = (usize::try_from(start).unwrap(), usize::try_from(stop).unwrap());
                assert!(found == stored[from..to], "{start}..{stop} of {length}");
            }
        }
        for beyond in [0..end + 1, end..end + 1, end + 1..end + 1, end + 9 * piece..end + 9 * piece + 5] {
            let answer = blobs.read_range(info.id, beyond.clone()).await;
            assert!(matches!(answer, Err(BlobError::Invalid(_))), "{beyond:?} of {length}: {answer:?}");
        }
        assert!(blobs.delete(info.id).await.unwrap());
    }
    let id = BlobId([1; 32]);
    let wide = 0..READ_BYTES_MAX as u64 + 1;
    assert!(matches!(blobs.read_range(id, wide).await, Err(BlobError::TooLarge { .. })));
    #[expect(clippy::reversed_empty_ranges)]
    let backwards = 2..1;
    assert!(matches!(blobs.read_range(id, backwards).await, Err(BlobError::Invalid(_))));
    let far = u64::MAX - 5..u64::MAX;
    assert_eq!(blobs.read_range(id, far).await, Err(BlobError::NotFound(id)));
}

async fn a_flipped_bit_is_never_delivered(blobs: &Blobs, place: &dyn Place) {
    for length in [1, 5000, PIECE_BYTES, 3 * PIECE_BYTES + 5] {
        let stored = bytes(11, length);
        let info = blobs.put(&stored).await.unwrap();
        for at in [0, length / 2, length - 1] {
            let flip = |bytes: &mut Vec<u8>| bytes[at] ^= 16;
            place.change(&content(info.id), &flip);
            let (found, error) = get(blobs, info).await;
            assert!(matches!(error, Some(BlobError::Corrupt { id, .. }) if id == info.id), "{error:?}");
            assert!(found.len() < length, "the last bytes of a damaged blob came out");
            let damaged = at as u64 / PIECE_BYTES as u64;
            for piece in 0..(length as u64).div_ceil(PIECE_BYTES as u64) {
                let start = piece * PIECE_BYTES as u64;
                let end = (start + 10).min(length as u64);
                match blobs.read_range(info.id, start..end).await {
                    Ok(found) => {
                        assert_ne!(piece, damaged, "a damaged range came out");
                        assert_eq!(
                            found,
                            stored[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]
                        );
                    }
                    Err(error) => {
                        assert_eq!(piece, damaged, "{error}");
                        assert!(matches!(error, BlobError::Corrupt { .. }), "{error}");
                    }
                }
            }
            // The message says that this heals it.
            assert!(error.unwrap().to_string().contains("upload it again"));
            assert_eq!(blobs.put(&stored).await, Ok(info));
            comes_back(blobs, info, &stored, "").await;
        }
        assert!(blobs.delete(info.id).await.unwrap());
    }
}

async fn another_length_is_damage(blobs: &Blobs, place: &dyn Place) {
    for length in [1, 5000, 2 * PIECE_BYTES + 5] {
        let stored = bytes(12, length);
        let info = blobs.put(&stored).await.unwrap();
        for other in [0, length - 1, length + 1, length + PIECE_BYTES] {
            place.change(&content(info.id), &|bytes| bytes.resize(other, 0));
            let (_, error) = get(blobs, info).await;
            assert!(matches!(error, Some(BlobError::Corrupt { .. })), "{length} became {other}: {error:?}");
            if other > 0 {
                // A piece that is still right may come out, and nothing else.
                match blobs.read_range(info.id, 0..1).await {
                    Ok(found) => assert_eq!(found, stored[..1]),
                    Err(BlobError::Corrupt { .. }) => {}
                    Err(error) => panic!("{length} became {other}: {error:?}"),
                }
            }
            blobs.put(&stored).await.unwrap();
        }
        assert!(blobs.delete(info.id).await.unwrap());
    }
}

async fn a_damaged_table_costs_time_and_not_truth(blobs: &Blobs, place: &dyn Place) {
    let stored = bytes(13, 3 * PIECE_BYTES + 5);
    let info = blobs.put(&stored).await.unwrap();
    let path = table(info.id);
    let last = stored.len() as u64 - 3..stored.len() as u64;
    let middle = PIECE_BYTES as u64 - 2..2 * PIECE_BYTES as u64 + 1;
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damages: [Change<'_>; 5] = [
        &|table| table[40] ^= 1,
        &|table| table.truncate(64),
        &|table| table.clear(),
        &|table| table.push(0),
        &|table| table.iter_mut().for_each(|byte| *byte = 0),
    ];
    let check = async || {
        for range in [last.clone(), middle.clone(), 0..0] {
            let (from, to) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
            assert!(blobs.read_range(info.id, range).await.unwrap() == stored[from..to]);
        }
        assert_eq!(get(blobs, info).await.1, None);
    };
    for damage in damages {
        place.change(&path, damage);
        check().await;
        blobs.put(&stored).await.unwrap();
    }
    place.remove(&path);
    check().await;
    // And both damaged at once is no truth either.
    place.change(&content(info.id), &|bytes| bytes[0] ^= 1);
    assert!(matches!(blobs.read_range(info.id, 0..1).await, Err(BlobError::Corrupt { .. })));
    assert!(blobs.delete(info.id).await.unwrap());
}

async fn lists_come_in_pages(blobs: &Blobs) {
    let mut expected = BTreeSet::new();
    for number in 0..23_u64 {
        expected.insert(blobs.put(&number.to_le_bytes()).await.unwrap());
    }
    let expected: Vec<_> = expected.into_iter().collect();
    for page in [0, 1, 2, 22, 23, 24, usize::MAX] {
        assert_eq!(all(blobs, page).await, expected, "pages of {page}");
    }
    let after = blobs.list(Some(expected[4].id), 3).await.unwrap();
    assert_eq!((&after.blobs[..], after.next), (&expected[5..8], Some(expected[7].id)));
    // Deleting on the way disturbs nobody.
    blobs.delete(expected[7].id).await.unwrap();
    assert_eq!(blobs.list(after.next, 2).await.unwrap().blobs, expected[8..10]);
    assert!(blobs.list(Some(BlobId([255; 32])), 3).await.unwrap().blobs.is_empty());
    clear(blobs).await;
}

/// Waits until what a dropped write leaves is removed behind the scenes.
pub(crate) async fn settle(blobs: &Blobs, place: &dyn Place, expected: usize) {
    for turn in 0.. {
        if place.objects().len() == expected && place.uploads() == 0 {
            break;
        }
        assert!(turn < 500, "left: {:?} and {} uploads", place.objects(), place.uploads());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(blobs.list(None, 1).await.unwrap().blobs.len(), expected.min(1));
}

/// Removes everything, what dropped writes left included.
async fn sweep_all(blobs: &Blobs, place: &dyn Place) {
    for _ in 0..500 {
        blobs.sweep(&Roots::default(), Duration::ZERO).await.unwrap();
        if place.objects().is_empty() && place.uploads() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    panic!("left: {:?} and {} uploads", place.objects(), place.uploads());
}

async fn dropped_writers_leave_nothing_visible(blobs: &Blobs, place: &dyn Place) {
    for length in [10, PART_BYTES + 1, 2 * PIECE_BYTES] {
        let stored = bytes(14, length);
        let mut writer = blobs.writer();
        writer.write(&stored).await.unwrap();
        assert!(all(blobs, 10).await.is_empty(), "half a blob is visible");
        drop(writer);
        settle(blobs, place, 0).await;
    }
    // Dropped at any moment of a put: nothing, or the whole.
    let stored = bytes(15, 2 * PIECE_BYTES + 100);
    let mut outcomes = [0, 0];
    for step in 0..40_u64 {
        let put = put_in_pieces(blobs, &stored, &[200_000]);
        let done = tokio::time::timeout(Duration::from_micros(step * step * 40), put).await;
        for info in all(blobs, 10).await {
            comes_back(blobs, info, &stored, "").await;
        }
        outcomes[usize::from(done.is_ok())] += 1;
        sweep_all(blobs, place).await;
    }
    // What was on its way when it was dropped may still end well: until nothing comes in many turns of the service.
    let mut empty_in_a_row = 0;
    while empty_in_a_row < 20 {
        let empty = place.objects().is_empty() && place.uploads() == 0;
        empty_in_a_row = if empty { empty_in_a_row + 1 } else { 0 };
        sweep_all(blobs, place).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(outcomes[0] > 0, "no put was interrupted: {outcomes:?}");
}

async fn a_write_that_is_dropped_midway_ends_the_writer(blobs: &Blobs, place: &dyn Place) {
    let mut writer = blobs.writer();
    let long = bytes(16, 4 * PIECE_BYTES);
    let midway = tokio::time::timeout(Duration::ZERO, writer.write(&long)).await;
    assert!(midway.is_err(), "too fast to be interrupted");
    assert!(matches!(writer.write(b"more").await, Err(BlobError::Invalid(_))));
    assert!(matches!(writer.finish().await, Err(BlobError::Invalid(_))));
    settle(blobs, place, 0).await;
}

async fn too_large_is_refused_early(blobs: &Blobs) {
    let chunk = bytes(17, 1 << 20);
    let mut writer = blobs.writer();
    for _ in 0..64 {
        writer.write(&chunk).await.unwrap();
    }
    let error = writer.write(&[0]).await.unwrap_err();
    let limit = options().blob_bytes_max;
    assert!(
        matches!(error, BlobError::TooLarge { size, limit: told, .. } if size == limit + 1 && told == limit)
    );
    assert!(writer.finish().await.is_err(), "the writer is of no use any more");
    assert!(all(blobs, 10).await.is_empty());
}

async fn many_writers_of_the_same_content_agree(blobs: &Blobs, place: &dyn Place) {
    let stored = bytes(18, PIECE_BYTES + 9);
    let mut writers = tokio::task::JoinSet::new();
    for turn in 0..8 {
        let (blobs, stored) = (blobs.clone(), stored.clone());
        writers.spawn(async move { put_in_pieces(&blobs, &stored, &[100_000 + turn]).await.unwrap() });
    }
    let infos = writers.join_all().await;
    assert!(infos.iter().all(|info| *info == infos[0]));
    assert_eq!(get(blobs, infos[0]).await, (stored, None));
    settle(blobs, place, 2).await;
}

/// Random lengths, cuts and ranges.
pub(crate) fn run_properties(runtime: &tokio::runtime::Runtime, blobs: &Blobs) {
    let lengths = prop_oneof![0..3_usize, 0..PART_BYTES * 2, 0..3 * PIECE_BYTES];
    let cuts = prop::collection::vec(1..600_000_usize, 1..6);
    let ranges = prop::collection::vec((0.0..=1.0, 0.0..=1.0), 1..8);
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    let check = |(length, seed, cuts, ranges): (usize, u64, Vec<usize>, Vec<(f64, f64)>)| {
        runtime.block_on(async {
            let stored = bytes(seed, length);
            let info = put_in_pieces(blobs, &stored, &cuts).await.unwrap();
            prop_assert_eq!(info.id.hex(), sha256(&stored));
            let (found, error) = get(blobs, info).await;
            prop_assert!(error.is_none() && found == stored);
            for (one, other) in ranges {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss
                )]
                let at = |share: f64| (share * length as f64) as usize;
                let (start, end) = (at(one.min(other)), at(one.max(other)));
                let found = blobs.read_range(info.id, start as u64..end as u64).await.unwrap();
                prop_assert!(found == stored[start..end]);
            }
            prop_assert!(blobs.delete(info.id).await.unwrap());
            Ok(())
        })
    };
    TestRunner::new(config).run(&(lengths, any::<u64>(), cuts, ranges), check).unwrap();
}

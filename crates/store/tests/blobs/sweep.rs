//! What nobody refers to goes, and nothing else.

use crate::data::{bytes, comes_back};
use crate::suite::{Place, all, content, settle, table};
use ashlar_store::blobs::{BlobError, BlobInfo, Blobs, Manifest, PIECE_BYTES, Roots, Swept};
use ashlar_vocabulary::BlobId;
use std::collections::BTreeSet;
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(3600);
const OLD: Duration = Duration::from_secs(2 * 3600);

pub(crate) async fn run(blobs: &Blobs, place: &dyn Place) {
    the_old_and_unreferenced_goes(blobs, place).await;
    a_manifest_that_cannot_be_read_stops_the_sweep(blobs, place).await;
    what_is_written_anew_is_young(blobs, place).await;
    tables_without_a_blob_go(blobs, place).await;
}

fn ids(infos: &[BlobInfo]) -> BTreeSet<BlobId> {
    infos.iter().map(|info| info.id).collect()
}

fn make_old(place: &dyn Place) {
    for path in place.objects() {
        place.make_old(&path, OLD);
    }
}

async fn the_old_and_unreferenced_goes(blobs: &Blobs, place: &dyn Place) {
    let large = blobs.put(&bytes(1, PIECE_BYTES + 1)).await.unwrap();
    let unreferenced_large = blobs.put(&bytes(2, PIECE_BYTES + 2)).await.unwrap();
    let (root, shard) = (blobs.put(b"root").await.unwrap(), blobs.put(b"shard").await.unwrap());
    let unreferenced = blobs.put(b"unreferenced").await.unwrap();
    let mut manifest = Manifest::default();
    manifest.insert("shard", shard).unwrap();
    manifest.insert("large", large).unwrap();
    let checkpoint = blobs.put_manifest(&manifest).await.unwrap();
    let roots = Roots { blobs: ids(&[root]), manifests: ids(&[checkpoint]) };
    // All is young.
    assert_eq!(blobs.sweep(&roots, GRACE).await, Ok(Swept::default()));
    make_old(place);
    let young = blobs.put(b"not referred to yet").await.unwrap();
    let swept = blobs.sweep(&roots, GRACE).await.unwrap();
    let gone = unreferenced_large.bytes + unreferenced.bytes;
    assert_eq!(swept, Swept { blobs: 2, bytes: gone, unfinished: 0 });
    let kept = ids(&[large, root, shard, checkpoint, young]);
    assert_eq!(ids(&all(blobs, 10).await), kept);
    assert_eq!(blobs.size(unreferenced.id).await, Ok(None));
    // The table of what went has gone with it; that of what stayed is there.
    assert!(!place.objects().contains(&table(unreferenced_large.id)));
    assert!(place.objects().contains(&table(large.id)));
    assert_eq!(blobs.get_manifest(checkpoint.id).await.unwrap(), manifest);
    let swept = blobs.sweep(&Roots::default(), Duration::ZERO).await.unwrap();
    assert_eq!(swept.blobs, 5);
    settle(blobs, place, 0).await;
}

async fn a_manifest_that_cannot_be_read_stops_the_sweep(blobs: &Blobs, place: &dyn Place) {
    let manifest = blobs.put_manifest(&Manifest::default()).await.unwrap();
    let other = blobs.put(b"other").await.unwrap();
    make_old(place);
    let absent = BlobId([9; 32]);
    let roots = |ids: &[BlobId]| Roots { manifests: ids.iter().copied().collect(), ..Roots::default() };
    assert_eq!(blobs.sweep(&roots(&[manifest.id, absent]), GRACE).await, Err(BlobError::NotFound(absent)));
    let error = blobs.sweep(&roots(&[manifest.id, other.id]), GRACE).await.unwrap_err();
    assert!(matches!(error, BlobError::Manifest { .. }), "{error}");
    assert_eq!(all(blobs, 10).await.len(), 2, "something was deleted");
    assert_eq!(blobs.sweep(&Roots::default(), GRACE).await.unwrap().blobs, 2);
}

async fn what_is_written_anew_is_young(blobs: &Blobs, place: &dyn Place) {
    for length in [5, 2 * PIECE_BYTES] {
        let stored = bytes(3, length);
        let info = blobs.put(&stored).await.unwrap();
        make_old(place);
        assert_eq!(blobs.put(&stored).await, Ok(info));
        assert_eq!(blobs.sweep(&Roots::default(), GRACE).await.unwrap().blobs, 0, "{length}");
        comes_back(blobs, info, &stored, "").await;
        blobs.delete(info.id).await.unwrap();
    }
}

async fn tables_without_a_blob_go(blobs: &Blobs, place: &dyn Place) {
    let info = blobs.put(&bytes(4, 2 * PIECE_BYTES)).await.unwrap();
    place.remove(&content(info.id));
    assert_eq!(blobs.sweep(&Roots::default(), GRACE).await, Ok(Swept::default()));
    assert_eq!(place.objects(), [table(info.id)], "a blob may be about to follow");
    make_old(place);
    assert_eq!(blobs.sweep(&Roots::default(), GRACE).await, Ok(Swept::default()));
    assert_eq!(place.objects(), Vec::<String>::new());
}

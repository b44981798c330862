//! Fetching with sources that fail in every way, and handing out over real connections.
#![allow(clippy::unwrap_used)]

use super::cache::ModelCache;
use super::fetch::{Candidate, Fetch, FetchError, Goal};
use super::peer::{Peer, PeerLinks};
use super::server::FileServer;
use super::shelf::Shelf;
use super::source::{Source, SourceError, SourceFile, check_files};
use crate::links::{self, LinkBreaker};
use ashlar_identity::{Socket, Transport};
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::digest::model_digest;
use ashlar_model::partial::{ModelFiles, RangeSet, read_present, slice_ranges};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{ModelConfig, RankSlice, StageModel};
use ashlar_protocol::data::{LinkHello, LinkPurpose};
use ashlar_protocol::files::{CHUNK_BYTES_MAX, FileAnswer, FileEntry, FileQuestion};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_vocabulary::{
    FloatType, HeadSlice, LayerRange, LeaseTerm, ModelDigest, Precision, ReplicaRevision,
};
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tempfile::TempDir;

/// Large enough for samples to be a small part of it.
const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "intermediate_size":768,"num_hidden_layers":4,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":32,
    "vocab_size":8192,"max_position_embeddings":256,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "tie_word_embeddings":false}"#;

fn model(seed: u64) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let shape = directory.path().join("shape.json");
    fs::write(&shape, CONFIG).unwrap();
    let shape = shape.to_string_lossy().into_owned();
    let request = SynthRequest { shape, dtype: FloatType::F32, seed, tokenizer: None };
    synthesize(directory.path(), &request, &mut |_, _| {}).unwrap();
    directory
}

fn digest(model: &Path) -> ModelDigest {
    model_digest(model, None).unwrap()
}

/// A stage of two layers.
fn stage(number: usize) -> RankSlice {
    RankSlice {
        layers: LayerRange { start: 2 * number, end: 2 * number + 2 },
        first: number == 0,
        last: number == 1,
        tensor_rank: 0,
        tensor_parallel_size: 1,
        head: (number == 1).then_some(HeadSlice { index: 0, of: 1 }),
    }
}

fn goal(model: &Path, slice: RankSlice) -> Goal {
    Goal { model: digest(model), precision: Precision::default(), slices: vec![slice] }
}

/// What a source does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// It does not know the model.
    Unknown,
    /// Its connection breaks after so many bytes.
    Breaks(u64),
    /// What it sends of the weights is found to be damaged.
    Damages,
    /// It has only so many of each file's first bytes.
    Has(u64),
}

/// Reads a directory.
struct Folder {
    files: Vec<SourceFile>,
    folder: PathBuf,
    fault: Fault,
    sent: u64,
    /// Over all connections.
    sent_ever: Arc<AtomicU64>,
}

impl Source for Folder {
    fn name(&self) -> &str {
        "folder"
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn batch(&self) -> (u64, usize) {
        (64 << 10, 7)
    }

    fn read(&mut self, file: &str, ranges: &[Range<u64>]) -> Result<Option<Vec<u8>>, SourceError> {
        let mut all = Vec::new();
        for range in ranges {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            File::open(self.folder.join(file)).unwrap().read_exact_at(&mut bytes, range.start).unwrap();
            all.extend(bytes);
        }
        self.sent += all.len() as u64;
        match self.fault {
            Fault::Breaks(after) if self.sent > after => return Err(FrameError::Closed.into()),
            Fault::Damages if file.ends_with(".safetensors") => {
                return Err(SourceError::Damaged(file.into()));
            }
            _ => {}
        }
        self.sent_ever.fetch_add(all.len() as u64, Ordering::Relaxed);
        Ok(Some(all))
    }
}

/// Somebody who has the model in `folder`, and how many bytes came from there.
fn folder(folder: &Path, fault: Fault) -> (Candidate<'static>, Arc<AtomicU64>) {
    let (folder, sent_ever) = (folder.to_owned(), Arc::<AtomicU64>::default());
    let sent = sent_ever.clone();
    let connect = move || {
        if fault == Fault::Unknown {
            return Err(SourceError::Unknown);
        }
        let of_name = |file: ashlar_model::partial::ModelFile| {
            let present = match fault {
                Fault::Has(first) => Some([0..first].into_iter().collect()),
                _ => None,
            };
            SourceFile { name: file.name, bytes: file.bytes, present }
        };
        let files = ModelFiles::of(&folder).unwrap().files.into_iter().map(of_name).collect();
        let source = Folder { files, folder: folder.clone(), fault, sent: 0, sent_ever: sent_ever.clone() };
        Ok(Box::new(source) as Box<dyn Source>)
    };
    (Candidate::new(format!("{fault:?}"), connect), sent)
}

fn fetch(root: &Path, goal: &Goal, candidates: Vec<Candidate<'_>>) -> Result<PathBuf, FetchError> {
    let cache = ModelCache::new(root.to_owned());
    let stop = AtomicBool::new(false);
    Fetch { cache: &cache, goal, progress: &|ready, total| assert!(ready <= total), stop: &stop }
        .run(candidates)
}

/// Checks that what is said to be there is, and that the slice loads from it.
#[track_caller]
fn assert_usable(fetched: &Path, whole: &Path, slice: &RankSlice) {
    for file in ModelFiles::of(whole).unwrap().files {
        let (got, expected) = (fetched.join(&file.name), fs::read(whole.join(&file.name)).unwrap());
        let found = fs::read(&got).unwrap();
        assert_eq!(found.len(), expected.len(), "{}", file.name);
        let all: RangeSet = [0..file.bytes].into_iter().collect();
        for range in read_present(&got).unwrap().unwrap_or(all).iter() {
            let range = range.start as usize..range.end as usize;
            assert!(found[range.clone()] == expected[range], "{}", file.name);
        }
    }
    assert_eq!(digest(fetched), digest(whole));
    let kernels = Arc::new(Kernels::new(Isa::best(), 1));
    StageModel::load(fetched, None, slice.clone(), kernels, &mut |_, _| {}).unwrap();
}

fn bytes_of(model: &Path, slice: &RankSlice) -> u64 {
    slice_ranges(model, None, slice).unwrap().values().map(RangeSet::bytes).sum()
}

#[test]
fn a_slice_is_fetched_once_and_another_one_costs_the_difference() {
    let (whole, root) = (model(1), tempfile::tempdir().unwrap());
    let (first, sent) = folder(whole.path(), Fault::None);
    let fetched = fetch(root.path(), &goal(whole.path(), stage(0)), vec![first]).unwrap();
    assert_usable(&fetched, whole.path(), &stage(0));
    let (slice, sent) = (bytes_of(whole.path(), &stage(0)), sent.load(Ordering::Relaxed));
    assert!(sent < slice + (3 << 20), "{sent} bytes for a slice of {slice}");
    // A second start needs nobody.
    fetch(root.path(), &goal(whole.path(), stage(0)), Vec::new()).unwrap();
    let error = fetch(root.path(), &goal(whole.path(), stage(1)), Vec::new()).unwrap_err();
    assert!(error.to_string().contains("nobody"), "{error}");
    let (second, sent) = folder(whole.path(), Fault::None);
    let both = RankSlice::whole(&ModelConfig::from_dir(whole.path()).unwrap().shape);
    fetch(root.path(), &goal(whole.path(), both.clone()), vec![second]).unwrap();
    assert_usable(&fetched, whole.path(), &both);
    let other = bytes_of(whole.path(), &stage(1));
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent <= other, "{sent} bytes for the other {other}");
}

#[test]
fn an_interrupted_fetch_goes_on_where_it_was() {
    let (whole, root) = (model(1), tempfile::tempdir().unwrap());
    let slice = bytes_of(whole.path(), &stage(0));
    let goal = goal(whole.path(), stage(0));
    let (broken, before) = folder(whole.path(), Fault::Breaks(2 * slice / 3));
    let error = fetch(root.path(), &goal, vec![broken]);
    let (sound, after) = folder(whole.path(), Fault::None);
    // Three connections may have been enough.
    if let Err(error) = error {
        assert!(error.to_string().contains("closed"), "{error}");
    }
    let fetched = fetch(root.path(), &goal, vec![sound]).unwrap();
    assert_usable(&fetched, whole.path(), &stage(0));
    let all = before.load(Ordering::Relaxed) + after.load(Ordering::Relaxed);
    assert!(all < slice + (4 << 20), "{all} bytes for a slice of {slice}: nothing came twice");
}

#[test]
fn whoever_sends_something_else_is_left_for_the_next_one() {
    let (whole, other, root) = (model(1), model(2), tempfile::tempdir().unwrap());
    let goal = goal(whole.path(), stage(1));
    let bad = || vec![folder(other.path(), Fault::None).0, folder(whole.path(), Fault::Damages).0];
    let error = fetch(root.path(), &goal, bad()).unwrap_err().to_string();
    assert!(error.contains("has digest") && error.contains("came damaged"), "{error}");
    assert!(!ModelCache::new(root.path().to_owned()).directory(goal.model).exists(), "nothing is kept");
    let (sound, _) = folder(whole.path(), Fault::None);
    let candidates: Vec<Candidate<'_>> = bad().into_iter().chain([sound]).collect();
    let fetched = fetch(root.path(), &goal, candidates).unwrap();
    assert_usable(&fetched, whole.path(), &stage(1));
}

#[test]
fn parts_come_from_whoever_has_them() {
    let (whole, root) = (model(1), tempfile::tempdir().unwrap());
    let goal = goal(whole.path(), stage(1));
    let (first, _) = folder(whole.path(), Fault::None);
    fetch(root.path(), &goal, vec![first]).unwrap();
    // The other stage: the beginning of the file from one, the rest from another.
    let bytes = fs::metadata(whole.path().join("model.safetensors")).unwrap().len();
    let (half, of_half) = folder(whole.path(), Fault::Has(bytes / 3));
    let (all, of_all) = folder(whole.path(), Fault::None);
    let goal = self::goal(whole.path(), stage(0));
    let fetched = fetch(root.path(), &goal, vec![folder(whole.path(), Fault::Unknown).0, half, all]).unwrap();
    assert_usable(&fetched, whole.path(), &stage(0));
    assert!(of_half.load(Ordering::Relaxed) > 0 && of_all.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_damaged_journal_costs_a_fetch_and_nothing_else() {
    let (whole, root) = (model(1), tempfile::tempdir().unwrap());
    let goal = goal(whole.path(), stage(0));
    let fetched = fetch(root.path(), &goal, vec![folder(whole.path(), Fault::None).0]).unwrap();
    fs::write(fetched.join("model.safetensors.present"), "ashlar ranges 1\n0 9").unwrap();
    let fetched = fetch(root.path(), &goal, vec![folder(whole.path(), Fault::None).0]).unwrap();
    assert_usable(&fetched, whole.path(), &stage(0));
}

#[test]
fn nobody_is_waited_for_once_it_is_not_wanted() {
    let (whole, root) = (model(1), tempfile::tempdir().unwrap());
    let (goal, stop) = (goal(whole.path(), stage(0)), AtomicBool::new(true));
    let cache = ModelCache::new(root.path().to_owned());
    let fetch = Fetch { cache: &cache, goal: &goal, progress: &|_, _| {}, stop: &stop };
    let error = fetch.run(vec![folder(whole.path(), Fault::Unknown).0]).unwrap_err();
    assert!(matches!(error, FetchError::Stopped), "{error}");
}

#[test]
fn lists_that_name_something_else_are_refused() {
    let file = |name: &str, bytes| SourceFile { name: name.into(), bytes, present: None };
    let good = [file("config.json", 100), file("model.safetensors", 1 << 40)];
    check_files(&good).unwrap();
    for bad in [
        file("../model.safetensors", 1),
        file("/etc/passwd", 1),
        file("config.json", 1 << 40),
        file("model.safetensors", 1),
        file("other.safetensors", u64::MAX),
        file("model.safetensors.present", 1),
    ] {
        assert!(check_files(&[&good[..], std::slice::from_ref(&bad)].concat()).is_err(), "{bad:?}");
    }
    assert!(check_files(&good[..1]).is_err(), "a model has weights");
}

/// Accepts as a node does and leaves the connections to `serve`, each on a thread of its own.
fn listen(serve: impl Fn(Socket) + Clone + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(links::accept(socket, &Transport::Plain).unwrap().socket));
        }
    });
    address
}

/// A node that hands this model out.
fn node(model: &Path) -> String {
    let shelf = Shelf::default();
    shelf.offer(digest(model), model);
    let server = FileServer::new(shelf);
    listen(move |socket| server.serve(socket))
}

fn peer_links() -> PeerLinks {
    PeerLinks {
        transport: Transport::Plain,
        breaker: Some(LinkBreaker::default()),
        term: LeaseTerm(1),
        revision: ReplicaRevision(1),
    }
}

fn peers<'a>(goal: &Goal, links: &'a PeerLinks, addresses: &'a [String]) -> Vec<Candidate<'a>> {
    let model = goal.model;
    let peer = |address: &'a String| {
        let connect = move || Ok(Box::new(Peer::connect(address, model, links)?) as Box<dyn Source>);
        Candidate::new(address.clone(), connect)
    };
    addresses.iter().map(peer).collect()
}

#[test]
fn a_slice_comes_over_the_wire_and_is_handed_on() {
    let (whole, links) = (model(1), peer_links());
    let (root, second_root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let goal = goal(whole.path(), stage(1));
    let addresses = [node(whole.path())];
    let fetched = fetch(root.path(), &goal, peers(&goal, &links, &addresses)).unwrap();
    assert_usable(&fetched, whole.path(), &stage(1));
    // A node that has fetched hands on what it has, and lacks what it lacks.
    let addresses = [node(&fetched)];
    let again = fetch(second_root.path(), &goal, peers(&goal, &links, &addresses)).unwrap();
    assert_usable(&again, whole.path(), &stage(1));
    let mut peer = Peer::connect(&addresses[0], goal.model, &links).unwrap();
    let weights = peer.files().iter().find(|file| file.has_weights()).unwrap().clone();
    let hole =
        [0..weights.bytes].into_iter().collect::<RangeSet>().without(weights.present.as_ref().unwrap());
    let hole = hole.iter().next().unwrap();
    assert!(peer.read("model.safetensors", &[hole.start..hole.start + 1]).unwrap().is_none());
}

/// Asks a node that hands out `model`, first for `first`, then for `then`.
fn asked(
    model: &Path,
    first: FileQuestion,
    then: FileQuestion,
) -> (FileAnswer, Result<FileAnswer, FrameError>) {
    let hello = LinkHello { term: LeaseTerm(1), revision: ReplicaRevision(1), purpose: LinkPurpose::Files };
    let mut socket = links::connect(&node(model), &hello, &Transport::Plain).unwrap();
    let mut ask = |question: &FileQuestion| {
        frame::write_blocking(&mut socket, question)?;
        frame::read_blocking::<FileAnswer>(&mut socket)
    };
    let answered = ask(&first).unwrap();
    (answered, ask(&then))
}

#[test]
fn only_files_of_a_known_model_are_handed_out() {
    let whole = model(1);
    fs::write(whole.path().join("secret.txt"), "secret").unwrap();
    symlink("/etc/passwd", whole.path().join("vocab.txt")).unwrap();
    let list = FileQuestion::List { model: digest(whole.path()) };
    let read =
        |name: &str, ranges: &[(u64, u32)]| FileQuestion::Read { name: name.into(), ranges: ranges.into() };
    let bytes = fs::metadata(whole.path().join("config.json")).unwrap().len();
    for improper in [
        read("secret.txt", &[(0, 1)]),
        read("vocab.txt", &[(0, 1)]),
        read("../config.json", &[(0, 1)]),
        read("/etc/passwd", &[(0, 1)]),
        read("config.json", &[(bytes, 1)]),
        read("config.json", &[(u64::MAX, 1)]),
        read("config.json", &[(0, 1); 3000]),
        read("model.safetensors", &[(0, CHUNK_BYTES_MAX as u32 + 1)]),
    ] {
        let (listed, answer) = asked(whole.path(), list.clone(), improper.clone());
        assert!(matches!(listed, FileAnswer::Files(_)));
        assert!(matches!(answer, Ok(FileAnswer::Refused(_))), "{improper:?}");
    }
    let (unlisted, _) = asked(whole.path(), read("config.json", &[(0, 1)]), list.clone());
    assert!(matches!(unlisted, FileAnswer::Refused(_)));
    let (unknown, _) = asked(whole.path(), FileQuestion::List { model: ModelDigest([7; 32]) }, list);
    assert_eq!(unknown, FileAnswer::Unknown);
}

#[test]
fn a_node_serves_few_at_a_time() {
    let whole = model(1);
    let (address, links) = (node(whole.path()), peer_links());
    let connect = || Peer::connect(&address, digest(whole.path()), &links);
    let served: Vec<Peer> = (0..4).map(|_| connect().unwrap()).collect();
    assert!(matches!(connect(), Err(SourceError::Busy)));
    drop(served);
    // Their places are free once the other side has seen their end.
    while matches!(connect(), Err(SourceError::Busy)) {
        std::thread::yield_now();
    }
}

#[test]
fn bytes_that_do_not_match_their_checksum_are_refused() {
    let address = listen(|mut socket| {
        let file = |name: &str| FileEntry { name: name.into(), bytes: 8, present: None };
        let answers = [
            FileAnswer::Files(vec![file("config.json"), file("model.safetensors")]),
            FileAnswer::Chunk { checksum: [0; 32], bytes: vec![1; 8] },
        ];
        for answer in answers {
            let _: FileQuestion = frame::read_blocking(&mut socket).unwrap();
            frame::write_blocking(&mut socket, &answer).unwrap();
        }
    });
    let mut peer = Peer::connect(&address, ModelDigest([1; 32]), &peer_links()).unwrap();
    assert!(matches!(peer.read("config.json", &[0..8]), Err(SourceError::Damaged(_))));
}

#[test]
fn a_peer_that_cannot_be_reached_is_named() {
    // A port that nobody has any more.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(TcpStream::connect(gone).is_err());
    let (whole, root, links) = (model(1), tempfile::tempdir().unwrap(), peer_links());
    let goal = goal(whole.path(), stage(0));
    let addresses = [gone.to_string()];
    let error = fetch(root.path(), &goal, peers(&goal, &links, &addresses)).unwrap_err().to_string();
    assert!(error.contains(&addresses[0]), "{error}");
}

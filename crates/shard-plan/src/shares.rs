//! What the ranks of a stage hold of every layer: worked out once, for a plan asks for many ranges of layers.

use ashlar_vocabulary::{AxisCut, HeadSlice, LayerRange, ModelShape, WeightType};
use std::sync::OnceLock;

/// A model, cut for groups of so many ranks.
#[derive(Debug, Clone)]
pub struct Shares<'a> {
    /// What it looks like.
    pub shape: &'a ModelShape,
    /// For every rank the sums over layers before the first, the second, … and over all.
    before: Vec<Vec<LayerShare>>,
    /// For every rank the words that the largest product of layers takes for each row: by the first layer, then by how many.
    row_words: Vec<Vec<Vec<usize>>>,
    /// The same of the head.
    head_row_words: usize,
    /// Bytes of each slice of the head that has been asked for: of 1, then of 2, and so on.
    head_bytes: Vec<OnceLock<usize>>,
}

/// Into how many slices a head is cut at most.
const HEAD_SLICES_MAX: usize = 8;

/// One rank's part of some layers.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct LayerShare {
    /// Bytes, as they lie in memory.
    pub bytes: u64,
    /// Weights that are multiplied with as floats.
    pub plain_weights: u64,
    /// Weights that are multiplied with as integers.
    pub quantized_weights: u64,
}

impl<'a> Shares<'a> {
    /// The shares of each of `tensor_parallel_size` ranks.
    pub fn new(shape: &'a ModelShape, tensor_parallel_size: usize) -> Shares<'a> {
        let sums = |rank: usize| {
            let mut sum = LayerShare::default();
            let mut before = vec![sum];
            for layer in 0..shape.num_layers {
                let own = one_layer(shape, layer, rank, tensor_parallel_size);
                sum.bytes += own.bytes;
                sum.plain_weights += own.plain_weights;
                sum.quantized_weights += own.quantized_weights;
                before.push(sum);
            }
            before
        };
        let row_words = |rank: usize| {
            let words = |layer| shape.layer_row_words(layer, rank, tensor_parallel_size);
            let by_layer: Vec<usize> = (0..shape.num_layers).map(words).collect();
            let from = |first: usize| {
                let mut largest = 0;
                let up_to = by_layer[first..].iter().map(|&words| {
                    largest = words.max(largest);
                    largest
                });
                std::iter::once(0).chain(up_to).collect()
            };
            (0..=shape.num_layers).map(from).collect()
        };
        let ranks = 0..tensor_parallel_size;
        Shares {
            shape,
            before: ranks.clone().map(sums).collect(),
            row_words: ranks.map(row_words).collect(),
            head_row_words: shape.head_row_words(),
            head_bytes: vec![OnceLock::new(); HEAD_SLICES_MAX * (HEAD_SLICES_MAX + 1) / 2],
        }
    }

    /// Bytes of a slice of the head. A plan asks for the same few with every range of layers that it considers, and blocks of a vocabulary
    /// take long to count.
    pub fn head_bytes(&self, head: HeadSlice) -> usize {
        let bytes = || self.shape.head_bytes(head);
        let known = self.head_bytes.get(head.of * head.of.saturating_sub(1) / 2 + head.index);
        known.filter(|_| head.index < head.of).map_or_else(bytes, |known| *known.get_or_init(bytes))
    }

    /// Ranks of a group.
    pub fn ranks(&self) -> usize {
        self.before.len()
    }

    /// What rank `rank` holds of `layers`.
    pub fn of(&self, rank: usize, layers: LayerRange) -> LayerShare {
        let (start, end) = (self.before[rank][layers.start], self.before[rank][layers.end]);
        LayerShare {
            bytes: end.bytes - start.bytes,
            plain_weights: end.plain_weights - start.plain_weights,
            quantized_weights: end.quantized_weights - start.quantized_weights,
        }
    }

    /// 32-bit words that the largest product of `layers` takes for each row of its activations on rank `rank`.
    pub fn row_words(&self, rank: usize, layers: LayerRange) -> usize {
        self.row_words[rank][layers.start][layers.len()]
    }

    /// The same of the head.
    pub fn head_row_words(&self) -> usize {
        self.head_row_words
    }

    /// Whether both ranges are the same to every rank.
    pub fn alike(&self, a: LayerRange, b: LayerRange) -> bool {
        let types = |range: LayerRange| &self.shape.weights.layers[range.start..range.end];
        a.len() == b.len() && types(a) == types(b)
    }
}

fn one_layer(shape: &ModelShape, layer: usize, rank: usize, tensor_parallel_size: usize) -> LayerShare {
    let len = |cut: AxisCut| cut.rank(rank, tensor_parallel_size).len();
    let (query, key, wide) =
        (len(shape.attention_cut()), len(shape.key_cut()), len(shape.feed_forward_cut()));
    let types = &shape.weights.layers[layer];
    let products = [
        (types.query, query),
        (types.key, key),
        (types.value, key),
        (types.output, query),
        (types.gate, wide),
        (types.up, wide),
        (types.down, wide),
    ];
    let weights = |wanted: &dyn Fn(WeightType) -> bool| {
        let of_type = products.iter().filter(|(kind, _)| wanted(*kind));
        of_type.map(|(_, width)| (width * shape.hidden_size) as u64).sum()
    };
    LayerShare {
        bytes: shape.layer_bytes(layer, rank, tensor_parallel_size) as u64,
        plain_weights: weights(&|kind| !kind.is_quantized()),
        quantized_weights: weights(&|kind| kind.is_quantized()),
    }
}

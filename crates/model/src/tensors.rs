//! What trains, as named tensors: which rows and columns of each a rank holds, and their numbers.
//!
//! An adapter's pairs and a whole model's weights are two lists of such tensors. Gradients, moments, norms and checkpoints only
//! see the list.

use crate::adapter::Target;
use crate::weights::{WeightError, WeightFiles};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Names a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorId {
    /// The embedding table.
    Embedding,
    /// A tensor of a layer of the model.
    Layer(usize, LayerTensor),
    /// A matrix of an adapter on a layer of the model.
    Adapter(usize, Target, AdapterHalf),
    /// The weight of the last norm.
    HeadNorm,
    /// The head. Where it is tied, what it shows of the table's gradient, and the copy of the table on a last stage that is not
    /// the first.
    Head,
}

/// A tensor of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerTensor {
    /// The weight of the norm before attention.
    InputNorm,
    /// The matrix of a linear layer.
    Weight(Target),
    /// Its bias.
    Bias(Target),
    /// The weight of the norm of query heads.
    QueryNorm,
    /// The weight of the norm of key heads.
    KeyNorm,
    /// The weight of the norm before the feed-forward layer.
    FeedForwardNorm,
}

/// One of an adapter's two matrices on a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdapterHalf {
    /// rank × inputs.
    A,
    /// outputs × rank.
    B,
}

/// How the ranks of a group share a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// Every rank has all of it, in the same bits.
    Whole,
    /// Rows, in these parts of a rank's own.
    Rows(Vec<Range<usize>>),
    /// Columns, in these parts of a rank's own.
    Columns(Vec<Range<usize>>),
}

/// A rank's share of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShare {
    /// Which tensor.
    pub id: TensorId,
    /// What files call it. A tied head is called like the table.
    pub name: String,
    /// (rows, columns) of the whole tensor; a vector is one row.
    pub shape: [usize; 2],
    /// Whether files have it as a vector: the weight of a norm, or a bias.
    pub is_vector: bool,
    /// The share's rows.
    pub rows: Range<usize>,
    /// The share's columns.
    pub columns: Range<usize>,
    /// What the other ranks of the group have.
    pub cut: Cut,
    /// Whether another stage has the same, which counts and is stored: a tied head beside the table.
    pub is_copy: bool,
}

impl TensorShare {
    /// Numbers of the share.
    pub fn numbers(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Whether weight decay pulls at it: at matrices, not at biases and weights of norms, as is usual with PyTorch (Hugging Face's
    /// trainer groups its parameters so).
    pub fn decays(&self) -> bool {
        !self.is_vector
    }
}

/// A rank's shares of all tensors, in canonical order.
#[derive(Debug, PartialEq, Eq)]
pub struct TensorLayout {
    shares: Vec<TensorShare>,
    places: BTreeMap<TensorId, usize>,
}

impl TensorLayout {
    /// These shares, each of another tensor.
    pub fn new(shares: Vec<TensorShare>) -> TensorLayout {
        let places = shares.iter().enumerate().map(|(place, share)| (share.id, place)).collect();
        TensorLayout { shares, places }
    }

    /// All shares, in canonical order.
    pub fn shares(&self) -> &[TensorShare] {
        &self.shares
    }

    /// Where a tensor stands in that order.
    pub fn place(&self, id: TensorId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    /// Numbers of all shares.
    pub fn numbers(&self) -> usize {
        self.shares.iter().map(TensorShare::numbers).sum()
    }
}

/// Numbers of a rank's shares: weights, a gradient or a moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensors {
    layout: Arc<TensorLayout>,
    numbers: Vec<Vec<f32>>,
}

impl Tensors {
    /// All zeros.
    pub fn zeros(layout: &Arc<TensorLayout>) -> Tensors {
        let numbers = layout.shares.iter().map(|share| vec![0.0; share.numbers()]).collect();
        Tensors { layout: layout.clone(), numbers }
    }

    /// What `numbers` gives for each share, row by row.
    ///
    /// # Panics
    /// If it gives another number of them than the share has.
    pub fn build<E>(
        layout: &Arc<TensorLayout>,
        numbers: impl FnMut(&TensorShare) -> Result<Vec<f32>, E>,
    ) -> Result<Tensors, E> {
        let mut numbers: Vec<Vec<f32>> = layout.shares.iter().map(numbers).collect::<Result<_, E>>()?;
        for (share, numbers) in layout.shares.iter().zip(&mut numbers) {
            assert_eq!(share.numbers(), numbers.len(), "a share of {} has its numbers", share.name);
            // They stay as long as the job: ledgers count on no more.
            numbers.shrink_to_fit();
        }
        Ok(Tensors { layout: layout.clone(), numbers })
    }

    /// The shares of whole tensors, which `whole` gives row by row.
    pub fn cut<E>(
        layout: &Arc<TensorLayout>,
        mut whole: impl FnMut(&TensorShare) -> Result<Vec<f32>, E>,
    ) -> Result<Tensors, E> {
        Tensors::build(layout, |share| {
            let whole = whole(share)?;
            let rows = whole.chunks_exact(share.shape[1].max(1)).skip(share.rows.start);
            Ok(rows.take(share.rows.len()).flat_map(|row| &row[share.columns.clone()]).copied().collect())
        })
    }

    /// The shares as a model's files have them, widened to f32.
    pub fn read(layout: &Arc<TensorLayout>, files: &WeightFiles) -> Result<Tensors, WeightError> {
        Tensors::build(layout, |share| {
            let whole = if share.is_vector { &share.shape[1..] } else { &share.shape[..] };
            files.tensor(&share.name, whole)?.read(share.rows.clone(), share.columns.clone())
        })
    }

    /// Which shares these are.
    pub fn layout(&self) -> &Arc<TensorLayout> {
        &self.layout
    }

    /// A tensor's share, rows × columns; `None` where the rank has none.
    pub fn get(&self, id: TensorId) -> Option<&[f32]> {
        Some(&self.numbers[self.layout.place(id)?])
    }

    /// The same, to write.
    pub fn get_mut(&mut self, id: TensorId) -> Option<&mut [f32]> {
        Some(&mut self.numbers[self.layout.place(id)?])
    }

    /// Memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.numbers.iter().map(|numbers| size_of::<f32>() * numbers.capacity()).sum()
    }

    /// Every share with its numbers, in canonical order.
    pub fn iter(&self) -> impl Iterator<Item = (&TensorShare, &[f32])> {
        self.layout.shares.iter().zip(self.tensors())
    }

    /// The numbers alone.
    pub fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        self.numbers.iter().map(Vec::as_slice)
    }

    /// The same, to write.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.numbers.iter_mut().map(Vec::as_mut_slice)
    }

    /// Makes zeros of another layout of it, in the same memory as far as that reaches.
    pub fn reset(mut self, layout: &Arc<TensorLayout>) -> Tensors {
        self.numbers.resize_with(layout.shares.len(), Vec::new);
        for (numbers, share) in self.numbers.iter_mut().zip(&layout.shares) {
            numbers.clear();
            numbers.resize(share.numbers(), 0.0);
        }
        Tensors { layout: layout.clone(), numbers: self.numbers }
    }

    /// Makes it numbers of another layout with as many tensors or fewer, of which each has at most as many numbers as now.
    pub fn shrink(mut self, layout: &Arc<TensorLayout>) -> Tensors {
        self.numbers.truncate(layout.shares.len());
        for (numbers, share) in self.numbers.iter_mut().zip(&layout.shares) {
            numbers.truncate(share.numbers());
        }
        Tensors { layout: layout.clone(), numbers: self.numbers }
    }
}

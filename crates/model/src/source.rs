//! Where a stage's weights come from: the model's own files, or the packed copy of an earlier start.

use ashlar_kernels::{PackedMatrix, SegmentLayout};
use ashlar_vocabulary::WeightType;
use std::ops::Range;

/// Hands out what a stage holds. Every piece has a name of its own, under which a packed copy keeps it.
pub(crate) trait WeightSource {
    /// Why it could not.
    type Error;

    /// A product over inputs in `parts`: `sources`, one above the other.
    fn matrix(
        &self,
        name: &str,
        sources: &[MatrixSource],
        parts: &[Range<usize>],
    ) -> Result<PackedMatrix, Self::Error>;

    /// `sources`, one after the other, in f32.
    fn vector(&self, name: &str, sources: &[VectorSource]) -> Result<Vec<f32>, Self::Error>;

    /// Rows to look up, whole and in their type, one after the other.
    fn table(&self, name: &str, source: &MatrixSource) -> Result<Vec<u8>, Self::Error>;
}

/// A piece of one stored matrix.
#[derive(Debug)]
pub(crate) struct MatrixSource {
    pub(crate) name: String,
    /// Shape of the stored tensor.
    pub(crate) shape: [usize; 2],
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    /// The type to hold it in.
    pub(crate) kind: WeightType,
}

/// A piece of one stored vector.
#[derive(Debug)]
pub(crate) struct VectorSource {
    pub(crate) name: String,
    /// Length of the stored tensor.
    pub(crate) length: usize,
    pub(crate) range: Range<usize>,
}

/// Something that a stage holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Content<'a> {
    Matrix(&'a PackedMatrix),
    Vector(&'a [f32]),
    Table { kind: WeightType, columns: usize, bytes: &'a [u8] },
}

/// Neighbours of one type: each run becomes one segment of the packed matrix.
pub(crate) fn runs(sources: &[MatrixSource]) -> impl Iterator<Item = &[MatrixSource]> {
    sources.chunk_by(|a, b| a.kind == b.kind)
}

/// The layout of the segment that a run becomes.
pub(crate) fn layout(run: &[MatrixSource], parts: &[Range<usize>]) -> SegmentLayout {
    let outputs = run.iter().map(|source| source.rows.len()).sum();
    SegmentLayout::new(run[0].kind, outputs, run[0].columns.start, parts)
}

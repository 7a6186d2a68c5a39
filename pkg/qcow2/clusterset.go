package qcow2

import (
	"iter"
	"math/bits"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// clusterSet is a set of host clusters. Sealed, it knows the place of each among all in ascending order.
type clusterSet struct {
	words []uint64
	rank  []int64 // of the first cluster of each group of rankWords words
}

const rankWords = 8

// newClusterSet makes an empty set of clusters below n. Memory is used where there are clusters: a bit for each.
func newClusterSet(n int64) *clusterSet { return &clusterSet{words: make([]uint64, (n+63)/64)} }

func (s *clusterSet) has(c format.Cluster) bool { return s.words[c/64]>>(uint(c)%64)&1 != 0 }

func (s *clusterSet) add(c format.Cluster) { s.words[c/64] |= 1 << (uint(c) % 64) }

func (s *clusterSet) remove(c format.Cluster) { s.words[c/64] &^= 1 << (uint(c) % 64) }

// seal counts the clusters: from now on none is added or removed.
func (s *clusterSet) seal() (clusters int64) {
	s.rank = make([]int64, (len(s.words)+rankWords-1)/rankWords)
	for i, w := range s.words {
		if i%rankWords == 0 {
			s.rank[i/rankWords] = clusters
		}
		clusters += int64(bits.OnesCount64(w))
	}
	return clusters
}

// before returns how many clusters of the set come before c.
func (s *clusterSet) before(c format.Cluster) int64 {
	i := int64(c / 64)
	n := s.rank[i/rankWords] + int64(bits.OnesCount64(s.words[i]&(1<<(uint(c)%64)-1)))
	for k := i / rankWords * rankWords; k < i; k++ {
		n += int64(bits.OnesCount64(s.words[k]))
	}
	return n
}

// runs yields the maximal runs of clusters in ascending order.
func (s *clusterSet) runs() iter.Seq[format.Run] {
	return func(yield func(format.Run) bool) {
		var r format.Run
		for i, w := range s.words {
			for at := int64(0); w != 0; {
				skip := bits.TrailingZeros64(w)
				n := bits.TrailingZeros64(^(w >> skip))
				at += int64(skip)
				if c := format.Cluster(int64(i)*64 + at); c == r.End() && r.N > 0 {
					r.N += int64(n)
				} else {
					if r.N > 0 && !yield(r) {
						return
					}
					r = format.Run{First: c, N: int64(n)}
				}
				at += int64(n)
				if w = w >> skip >> n; n == 64 {
					w = 0
				}
			}
		}
		if r.N > 0 {
			yield(r)
		}
	}
}

// Package lock has the locks of an image. Each has a place in the order in which they are taken: who holds one takes none whose
// place comes before it. Builds with the tag lockorder, which the tests are run with, panic when a goroutine does.
package lock

// A Place is a type, so that a lock needs no constructor to know its own.
type Place interface {
	place() int
	comparable
}

// The places, first to last.
type (
	// Change is for the running operation on snapshots or the size.
	Change struct{}
	// Gate is for guests' requests, or for what needs them to stop.
	Gate struct{}
	// Guests is for the guest clusters of a request.
	Guests struct{}
	// Table is for giving the active disk an L2 table of its own.
	Table struct{}
	// Commit is for the running commit.
	Commit struct{}
	// Ledger is for changing live counts and writing them.
	Ledger struct{}
	// Growth is for an operation's writes, or a larger length.
	Growth struct{}
	// Counts is for the counts in memory.
	Counts struct{}
	// View is for a snapshot's tables in memory.
	View struct{}
	// Mapping is for the mapping in memory.
	Mapping struct{}
	// Header is for the switch of the header.
	Header struct{}
	// Metadata is for what is known to be metadata.
	Metadata struct{}
	// Lease is for the renewal of the file's mark.
	Lease struct{}
	// Sync is for a running sync.
	Sync struct{}
	// Partial is for a block that is written in part; of two the lower first.
	Partial struct{}
	// Queue is for a queue, for a moment.
	Queue struct{}
)

func (Change) place() int   { return 1 }
func (Gate) place() int     { return 2 }
func (Guests) place() int   { return 3 }
func (Table) place() int    { return 4 }
func (Commit) place() int   { return 5 }
func (Ledger) place() int   { return 6 }
func (Growth) place() int   { return 7 }
func (Counts) place() int   { return 8 }
func (View) place() int     { return 9 }
func (Mapping) place() int  { return 10 }
func (Header) place() int   { return 11 }
func (Metadata) place() int { return 12 }
func (Lease) place() int    { return 13 }
func (Sync) place() int     { return 14 }
func (Partial) place() int  { return 15 }
func (Queue) place() int    { return 16 }

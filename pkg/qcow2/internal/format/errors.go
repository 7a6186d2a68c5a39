package format

import "errors"

// Errors that the callers of qcow2 match, too.
var (
	// ErrCorrupt is returned for metadata that contradicts the format.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrUnsupported is returned for a legal feature that is refused. The text names it.
	ErrUnsupported = errors.New("not supported")
	// ErrLimit is returned for what exceeds a limit of the format.
	ErrLimit = errors.New("limit exceeded")
)

// Package thread runs functions that change what the kernel keeps for each thread: namespaces, capabilities.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run calls fn on a thread that ends with it, whatever fn has made of it.
func Run(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- fn()
			return // without unlocking: the thread ends
		}
		// The main thread would stay, and keep what it was given. It waits here, so that it is not taken again.
		defer runtime.UnlockOSThread()
		done <- Run(fn)
	}()
	return <-done
}

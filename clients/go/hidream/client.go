// Package hidream is a small client of a hidream-grpc server, on the generated stubs in v1.
package hidream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"google.golang.org/grpc"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Client calls one server. Its methods may be called at the same time. Errors of the server are gRPC
// status errors, with the details that image_gen.proto lists.
type Client struct {
	stub hidreamv1.ImageGenClient
}

// NewClient is a client on a connection, which stays the caller's to close.
func NewClient(connection grpc.ClientConnInterface) *Client {
	return &Client{stub: hidreamv1.NewImageGenClient(connection)}
}

// Generate draws images and follows the job to its end. It calls onEvent, which may be nil, with
// every event but the pieces of images, which it puts together and checks.
//
// Cancelling ctx cancels the job at its next step, unless request.Detached is set; the deadline of
// ctx is the job's. A job that fails is a gRPC status error; an image that did not arrive as it was
// announced wraps ErrBrokenImage, any other broken promise of the stream ErrBrokenStream. An image that
// the server has lost is a status error with codes.DataLoss: its details (errdetails.ErrorInfo) name it.
func (c *Client) Generate(
	ctx context.Context,
	request *hidreamv1.GenerateRequest,
	onEvent func(*hidreamv1.JobEvent),
) ([]Image, error) {
	// Leaving early must end the call, or it would live as long as the caller's context.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.stub.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	story := story{onEvent: onEvent}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return story.images()
		}
		if err != nil {
			return nil, err
		}
		if err := story.add(response.GetEvent()); err != nil {
			return nil, err
		}
	}
}

// Submit queues a job and returns it at once.
func (c *Client) Submit(ctx context.Context, request *hidreamv1.SubmitJobRequest) (*hidreamv1.Job, error) {
	return c.stub.SubmitJob(ctx, request)
}

// Batch queues many jobs, all of them or none, and returns them in the order of the requests.
func (c *Client) Batch(ctx context.Context, requests []*hidreamv1.SubmitJobRequest) ([]*hidreamv1.Job, error) {
	response, err := c.stub.BatchSubmitJobs(ctx, &hidreamv1.BatchSubmitJobsRequest{Requests: requests})
	return response.GetJobs(), err
}

// Get returns a job as it is now.
func (c *Client) Get(ctx context.Context, jobID string) (*hidreamv1.Job, error) {
	return c.stub.GetJob(ctx, &hidreamv1.GetJobRequest{JobId: jobID})
}

// List gives the caller's jobs that match, newest first, from the request's page on, and fetches page
// after page as they are read. An error is the last that it gives.
func (c *Client) List(ctx context.Context, request *hidreamv1.ListJobsRequest) iter.Seq2[*hidreamv1.Job, error] {
	return func(yield func(*hidreamv1.Job, error) bool) {
		pageToken := request.GetPageToken()
		for {
			page, err := c.stub.ListJobs(ctx, &hidreamv1.ListJobsRequest{
				PageSize:  request.GetPageSize(),
				PageToken: pageToken,
				States:    request.GetStates(),
				Labels:    request.GetLabels(),
			})
			if err != nil {
				yield(nil, err)
				return
			}
			for _, job := range page.GetJobs() {
				if !yield(job, nil) {
					return
				}
			}
			if pageToken = page.GetNextPageToken(); pageToken == "" {
				return
			}
		}
	}
}

// Cancel stops a job at its next step and returns it as it is then; one that has ended stays as it is.
func (c *Client) Cancel(ctx context.Context, jobID string) (*hidreamv1.Job, error) {
	return c.stub.CancelJob(ctx, &hidreamv1.CancelJobRequest{JobId: jobID})
}

// Delete deletes a job that has ended, and its images.
func (c *Client) Delete(ctx context.Context, jobID string) error {
	_, err := c.stub.DeleteJob(ctx, &hidreamv1.DeleteJobRequest{JobId: jobID})
	return err
}

// story is what a stream of events tells of one job, over any number of calls.
type story struct {
	onEvent   func(*hidreamv1.JobEvent)
	assembler ImageAssembler
	job       *hidreamv1.Job
}

func (s *story) add(event *hidreamv1.JobEvent) error {
	if chunk := event.GetImageChunk(); chunk != nil {
		return s.assembler.Add(chunk)
	}
	if succeeded := event.GetSucceeded(); succeeded != nil {
		// Before anybody is told of a success.
		if _, err := s.assembler.Images(succeeded.GetJob()); err != nil {
			return err
		}
		s.job = succeeded.GetJob()
	}
	if s.onEvent != nil {
		s.onEvent(event)
	}
	return nil
}

func (s *story) images() ([]Image, error) {
	if s.job == nil {
		if err := s.assembler.unfinished(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: it ended before the job did", ErrBrokenStream)
	}
	return s.assembler.Images(s.job)
}
